"""The learned reward over HTTP, as other trainers ask for it."""
