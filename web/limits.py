"""What visitors may ask of the server behind the page: which addresses, how much at once, and for how long.

Gradio serves more than this page needs, such as uploads, files and proxies. Only what is listed here is answered.
"""

import asyncio
import os
import re
import time
from collections import Counter
from urllib.parse import parse_qs

# Gradio makes a table of its last events after each one, which takes longer the more there are. This is read when a queue is made.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")

import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.exceptions import Error
from gradio.route_utils import FnIndexInferError
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

BODY = 16 * 2**20  # bytes of one request
DRAINED = 4 * BODY  # bytes of a too large request that are read and dropped, so that the client hears why it is refused
SESSIONS = 100  # visitors whose conversations the server holds; the one that was away longest is dropped first
WAITING = 128  # events in the queue
MESSAGE = 500  # characters of an error
PATIENCE = 30  # seconds for which an event waits for somebody who listens to it
NO_SUCH_ADDRESS = "This page has no such address."
NO_SUCH_EVENT = "This page has no such event."
TOO_LARGE = f"A request has at most {BODY // 2**20} MB."
NOT_READ = "This page cannot read the request."
FAILED = "The page failed at this request; its terminal says more."
API = "/gradio_api"
ADDRESSES = re.compile(
    r"/|/(assets|static|svelte)/.+|/(theme\.css|favicon\.ico|robots\.txt|manifest\.json|config|login|logout)/?|"
    rf"{API}/(info|openapi\.json|app_id|startup-events|user|login_check|cancel|reset|theme\.css)/?|{API}/heartbeat/[^/]+|"
    rf"{API}/queue/(join|data|status)|{API}/(run|api|call|call/v2)/[^/]+/?|{API}/call/(v2/)?[^/]+/[^/]+")
ALL_SAID = b'data: {"msg":"close_stream"'
EVENT = re.compile(rf"{API}/call/(?:v2/)?[^/]+/([^/]+)")


def settings():
    """Keywords of gr.Blocks.launch that set these limits."""
    handlers = {RequestValidationError: sentence(422, NOT_READ), FnIndexInferError: sentence(404, NO_SUCH_EVENT),
                KeyError: sentence(404, NO_SUCH_EVENT), Exception: sentence(500, FAILED)}
    return {"state_session_capacity": SESSIONS, "enable_monitoring": False, "run_history": False, "show_error": False,
            "ssr_mode": False, "mcp_server": False,
            "max_file_size": 1, "app_kwargs": {"middleware": [Middleware(Limits, BODY, PATIENCE)], "exception_handlers": handlers}}


def sentence(code, words):
    """A handler that answers an exception with one sentence. Gradio's own answer would repeat the request or say nothing."""
    def answer(request, error):
        return refusal(code, words)
    return answer


def refusal(code, words):
    return JSONResponse({"detail": words}, code)


class Blocks(gr.Blocks):
    """A page whose every error is one sentence. Gradio would send nothing but "error": null."""

    async def preprocess_data(self, *arguments, **more):
        try:
            return await super().preprocess_data(*arguments, **more)
        except Error:
            raise
        except Exception as error:
            raise Error(NOT_READ, print_exception=False) from error

    async def process_api(self, *arguments, **more):
        try:
            return await super().process_api(*arguments, **more)
        except Error as error:
            error.message = plain(error.message)
            raise
        except Exception as error:
            raise Error(FAILED) from error  # gradio prints it to the terminal


def plain(message):
    """The message of an error, cut, without tags. It may quote what was sent, and a browser shows it as HTML."""
    return str(message)[:MESSAGE].replace("<", "‹")


class Limits:
    """ASGI middleware that refuses other addresses and large requests, and drops events to which nobody listens."""

    def __init__(self, app, body, patience):
        self.app, self.body, self.patience = app, body, patience
        self.listening, self.unheard, self.watching = Counter(), {}, None  # unheard: {(session, its events): since when}

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # there are no web sockets
            await send({"type": "websocket.close"})
        elif not known(path_of(scope)):
            await refusal(404, NO_SUCH_ADDRESS)(scope, receive, send)
        elif scope["method"] == "POST":
            await self.post(scope, receive, send)
        elif session := session_of(scope):
            await self.stream(session, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def post(self, scope, receive, send):
        body = await whole_body(receive, self.body)
        if body is None:
            await refusal(413, TOO_LARGE)(scope, receive, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return messages.pop() if messages else await receive()
        await self.app(scope, again, send)
        await self.sweep(blocks_of(scope))

    async def stream(self, session, scope, receive, send):
        """Serve a stream of messages. If the client vanishes, what it waits for is dropped at the next token."""
        ended, blocks = False, blocks_of(scope)
        unknown = session not in blocks._queue.pending_messages_per_session

        async def watched(message):
            nonlocal ended
            await send(message)
            if message["type"] == "http.response.body":  # clients leave as soon as they are told that all is said
                ended = ended or not message.get("more_body") or message["body"].startswith(ALL_SAID)
        self.listening[session] += 1
        try:
            await self.app(scope, receive, watched)
        except RuntimeError:  # gradio says that it knows no such session, and breaks the connection
            if not unknown:
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.listening -= Counter([session])
            for_one_call = session == event_of(scope)  # gradio made such a session itself
            if session not in self.listening and (for_one_call or not ended):
                await forget(blocks, session)
            if for_one_call:
                blocks.state_holder.session_data.pop(session, None)
                blocks.state_holder.time_last_used.pop(session, None)
            await self.sweep(blocks)

    async def sweep(self, blocks):
        """Forget the sessions that have had the same events for too long while nobody listened. Go on while there are some."""
        now, queue = time.monotonic(), blocks._queue
        silent = [(session, frozenset(queue.pending_event_ids_session.get(session, ())))
                  for session in list(queue.pending_messages_per_session) if session not in self.listening]
        self.unheard = {one: self.unheard.get(one, now) for one in silent}
        for one, since in list(self.unheard.items()):
            if now - since >= self.patience:
                self.unheard.pop(one, None)
                await forget(blocks, one[0])
        if self.unheard and self.watching is None:
            self.watching = asyncio.create_task(self.watch(blocks))

    async def watch(self, blocks):
        try:
            while self.unheard:
                await asyncio.sleep(self.patience / 4)
                await self.sweep(blocks)
        finally:
            self.watching = None


def path_of(scope):
    """The path of a request, without the prefix under which a proxy serves the page (GRADIO_ROOT_PATH)."""
    prefix = scope.get("root_path", "").rstrip("/")
    inside = prefix and (scope["path"] + "/").startswith(prefix + "/")
    return scope["path"][len(prefix):] or "/" if inside else scope["path"]


def known(path):
    """Whether a path is one of the page's."""
    return bool(ADDRESSES.fullmatch(path)) and ".." not in path and path.isprintable()


def blocks_of(scope):
    return scope["app"].get_blocks()


def event_of(scope):
    """The event of the path, if it has one."""
    found = EVENT.fullmatch(path_of(scope))
    return found and found[1]


def session_of(scope):
    """The session of which a request streams messages, or None."""
    if path_of(scope) == f"{API}/queue/data":
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    event = blocks_of(scope)._queue.event_ids_to_events.get(event_of(scope))
    return event.session_hash if event else event_of(scope)


async def whole_body(receive, most):
    """The body of a request, or None if it has more than `most` bytes or its client is gone."""
    parts, size, more = [], 0, True
    while more and size <= max(most, DRAINED):
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        parts = parts if size <= most else [b""]
    return b"".join(parts) if size <= most else None


async def forget(blocks, session):
    """Drop a session's events and messages. An answer that is being written for it ends at its next token."""
    queue = blocks._queue
    await queue.clean_events(session_hash=session)
    queue.pending_messages_per_session.pop(session, None)
    queue.pending_event_ids_session.pop(session, None)
