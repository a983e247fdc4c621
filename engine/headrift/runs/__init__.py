"""Run folders: written by one writer, read by one reader."""
