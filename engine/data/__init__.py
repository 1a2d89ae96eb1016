"""Images and tables of images: the user's own files, decoding in a sandbox, DICOM, splits, leaks,
near duplicates, and stored columns as arrays."""
