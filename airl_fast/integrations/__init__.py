"""Adapters that hand the learned reward to other trainers."""
