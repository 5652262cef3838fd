"""The dashboard: a page at `/` that shows and does with a browser what the API shows and does.

It is plain HTML, CSS and native ES modules, without a build step, and talks to `/v1` with fetch. NiceGUI was tried
first: it kept every view's state on the server behind a WebSocket of its own, outside of the API's keys, needed inline
scripts and eval (so no Content-Security-Policy worth the name), and brought 29 MB and forty packages. Here a view
is what the API answers, the key never leaves the tab, and the policy allows scripts of this host only.

Knows nothing about jobs, files or models: ``static`` does, through the API alone.
"""
