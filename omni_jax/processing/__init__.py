"""Media and text to arrays: tokenizer, chat prompt, log-mel, pictures and video. numpy only, no torch, no jax."""
