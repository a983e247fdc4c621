"""What the command line does, a command a module. Imports stay light: a command loads what it needs when it runs."""
