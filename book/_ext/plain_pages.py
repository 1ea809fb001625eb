"""Leave Thebe out of the pages: Jupyter Book loads it by default, twice, which is an error in the browser's console.

The book is read without a kernel, so nothing of Thebe is used, and its script address points outside the site.
"""


def setup(app):
    """Drop every event handler and style sheet that ``sphinx_thebe`` has registered."""
    for listeners in app.events.listeners.values():
        listeners[:] = [each for each in listeners if not each.handler.__module__.startswith("sphinx_thebe")]
    app.registry.css_files[:] = [entry for entry in app.registry.css_files if "thebe" not in entry[0]]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
