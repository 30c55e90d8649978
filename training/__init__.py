"""How the built-in demo model was made, from authored texts to a quantized build; see training/README.md."""
