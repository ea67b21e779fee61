"""A page in a notebook, in a frame of its own: neither its style nor its script can reach the notebook."""

from html import escape


def framed(title: str, page: str) -> str:
    """Put a whole HTML page into a frame.

    Args:
        title: of the frame, as text.
        page: HTML that needs no other file.

    Returns:
        HTML for a cell of a notebook.
    """
    return (
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" srcdoc="{escape(page, quote=True)}" '
        'style="width: 100%; height: 40rem; border: 1px solid #8888"></iframe>'
    )
