"""`headrift selftest`: whether headrift measures right on this machine, with this model."""
