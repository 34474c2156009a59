"""Model folders from elsewhere, the state folder, a full log disk, a port that is somebody else's: findings 5, 12."""

import contextlib
import http.server
import os
import resource
import threading
from pathlib import Path

from scripts.abuse import Place, Seen, agent_of, all_of, case, command
from tests.rack.harness import model, until
from tests.tiny_model import write_tiny_model

SECRET = b"TOP-SECRET-RACK-KEY"


LINKS = {
    "link": ("LICENSE.txt", "{secret}"),
    "relative link": ("LICENSE.txt", "../rack.secret"),
    "link to a link": ("vocab.txt", "LINK"),
    "link to a folder": ("1_Pooling", "{secret}/.."),
    "git's credentials": ("LICENSE.txt", ".git/config"),
    "device": ("vocab.txt", "/dev/zero"),
    "probes": ("mlxrack-probes.json", "{secret}"),
}
"""What a clone or an archive may carry: name and target."""


def _pack(kind: str, folder: Path, secret: Path) -> None:
    """Put one of the kinds into a model's folder."""
    (folder / ".git").mkdir()
    (folder / ".git/config").write_bytes(SECRET)
    (folder / "LINK").symlink_to(secret)
    if kind in LINKS:
        name, target = LINKS[kind]
        (folder / name).symlink_to(os.path.normpath(target.format(secret=secret)))
    elif kind == "hard link":
        os.link(secret, folder / "LICENSE.txt")
    else:
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")


@case(
    "links-in-models",
    "5",
    "models push and pull of folders with links, hard links, devices and FIFOs",
    "refused, naming the file; nothing in the bucket or the store; nothing hangs",
    limit_s=240,
)
def links_in_models(place: Place) -> Seen:
    """The secret is 0600 beside the folder."""
    secret = place.folder / "rack.secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    write_tiny_model(place.folder / "clean", seed=1)
    agent, checks = agent_of(place, [], start=False), []
    for number, name in enumerate((*LINKS, "hard link", "FIFO")):
        folder = place.folder / f"model-{number}"
        folder.mkdir()
        for path in (place.folder / "clean").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        _pack(name, folder, secret)
        verbs = (("push", str(folder), "m"), ("pull", str(folder)))
        results = [command(agent, "models", *words, limit_s=60) for words in verbs]
        named = all(any(f.name in said for f in folder.iterdir()) for status, said in results if status)
        tops = (place.folder / "bucket", agent.state)
        leaked = any(_holds(path) for top in tops for path in top.rglob("*"))
        refused = all(status for status, _ in results) or name == "probes"
        words = "leaked" if leaked else "refused" if refused else "taken"
        checks.append((refused and named and not leaked, f"{name}: {words}"))
    return all_of(*checks)


def _holds(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_file() and SECRET in path.read_bytes()
    return False


def _open(folder: Path) -> list[str]:
    return [p.name for p in (folder, *folder.rglob("*")) if not p.is_symlink() and p.stat().st_mode & 0o077]


@case(
    "state-modes",
    "12",
    "umask 0; then a state folder of mode 0755 whose files are 0644",
    "all of it is 0600/0700, corrected at the start; the admin token that could be read is another",
)
def state_modes(place: Place) -> Seen:
    """As an older version, or a careless copy, leaves it."""
    os.umask(0)
    agent = agent_of(place, [model()])
    agent.chat()
    until(lambda: agent.status()["push"]["sent_batches"], "a batch is sent", 60)
    fresh, token = _open(agent.state), (agent.state / "admin.token").read_text()
    agent.kill()
    for path in (agent.state, *agent.state.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    agent.start()
    left, kept = _open(agent.state), (agent.state / "admin.token").read_text() == token
    return all_of(
        (not fresh, f"open to others when fresh: {', '.join(fresh[:5]) or 'nothing'}"),
        (not left, f"after a start: {', '.join(left[:5]) or 'nothing'}"),
        (not kept, "the token is " + ("the same" if kept else "new")),
    )


@case(
    "stale-port",
    "12",
    "SIGKILL, then another program on the agent's port; two agents on one state folder",
    "no admin token is sent; the second agent is refused",
)
def stale_port(place: Place) -> Seen:
    """The port file outlives the agent."""
    seen: list[str] = []

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(str(self.headers))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    agent = agent_of(place, [model()])
    second = command(agent, "run", limit_s=60)
    agent.kill()
    server = http.server.HTTPServer(("127.0.0.1", agent.port), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    token = (agent.state / "admin.token").read_text().strip()
    said = [command(agent, *words)[1] for words in (("status",), ("unload", "m"), ("seal",))]
    sent = sum(token in one for one in seen)
    return all_of(
        (sent == 0, f"the token was sent {sent} of {len(said)} times"),
        (second[0] != 0 and "in use by another agent" in second[1], f"the second agent ended with {second[0]}"),
    )


@case(
    "full-log-disk",
    "12",
    "the log cannot grow (1,500 requests)",
    "requests are served; status says that lines are lost",
)
def full_log_disk(place: Place) -> Seen:
    """A limit on the size of files stands in for a full drive of the logs."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    agent = agent_of(place, [model()])
    count = place.size(1500, 700)
    good = sum(agent.chat().status == 200 for _ in range(count))
    said, status = command(agent, "status")[1], agent.status()
    told = next((line for line in said.splitlines() if "log" in line and "lines" in line), "")
    return all_of(
        (good == count, f"{good} of {count} served"),
        (bool(told) or bool(status["push"]["disk_problem"]), f"status: {told or 'nothing about the log'}"),
    )
