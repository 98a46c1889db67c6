"""The forecasters that ship, one file each; a new file here is a new forecaster."""
