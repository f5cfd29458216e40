"""A local page that draws: jobs in a queue, pictures, a gallery, and the HTTP server between them and a browser."""
