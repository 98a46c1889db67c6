"""The policies that ship, one file each; a new file here is a new policy."""
