"""Commands that train, convert models and check a machine."""
