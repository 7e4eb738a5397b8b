"""The recipe of the small trained model: its data, its codec, its configuration."""
