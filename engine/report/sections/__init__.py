"""The sections of the page: each turns results into what its template shows, and into tables."""
