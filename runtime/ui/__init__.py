"""A local page that generates images: a queue of jobs, pictures, a gallery, and the HTTP server of the page."""
