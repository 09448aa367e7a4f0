"""The command line, sessions and the page in a browser: what people start."""
