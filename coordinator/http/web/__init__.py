"""Pages for browsers: a view and a template each, fed by the read model; no build step, nothing from elsewhere.

`site` binds the pages to their routes, `guards` lets in and refuses, `rendering` makes HTML, `live` sends what changes.
"""
