"""Photos with captions: one file a data set, all read back as a `records.Split`."""
