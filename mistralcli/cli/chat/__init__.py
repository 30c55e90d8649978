"""`mistral chat`: a conversation at the terminal."""
