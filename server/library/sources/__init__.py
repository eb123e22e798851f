"""Where adapters come from when nobody uploads them: the Hub, buckets, web servers, directories of this machine."""
