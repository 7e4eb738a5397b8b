"""The checkpoint nano, which `train/nano` made: its files lie here, and README.md is its model card."""
