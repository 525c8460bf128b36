"""Readers: files of any known format to records (`files`), records of any known layout to texts and conversations (`layouts`)."""
