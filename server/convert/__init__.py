"""Adapters in formats that are not served, made into ones that are. Runs on its own, beside any server."""
