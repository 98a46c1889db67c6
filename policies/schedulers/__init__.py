"""The batch schedulers that ship, one file each; a new file here is a new scheduler."""
