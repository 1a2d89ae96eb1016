"""Images and tables of images: decoding in a sandbox, DICOM, the user's own files, splits, leaks,
near duplicates, stored columns as arrays."""
