"""The networks: arrays in, arrays out."""
