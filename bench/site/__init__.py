"""Results as a static site: boards, a page for each defense on them, and any two side by side, without a server."""
