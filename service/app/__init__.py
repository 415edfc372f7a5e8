"""The composition root: settings become a running server, and a signal its orderly end."""

from service.app.process import serve
from service.app.server import App
from service.app.start_error import StartError

__all__ = ["App", "StartError", "serve"]
