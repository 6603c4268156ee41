"""Pictures: matplotlib figures from arrays and files. Nothing here trains or needs torch."""
