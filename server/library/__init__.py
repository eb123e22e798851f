"""Adapters as the front process knows them: checked, committed, resolved. No torch here."""
