"""The process that reads, checks, decodes and packs adapters, and the front's doors to it."""
