"""The rooms of `build_mar.sh`: from a bundle to an archive that is the same bytes wherever it is built."""
