"""Commands that sample from models and compare them."""
