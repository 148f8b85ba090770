"""Ground floor shared by data_prep, nextpt and launcher: errors, files, stores, processes."""
