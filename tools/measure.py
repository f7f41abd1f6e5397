"""What scripts/bench.sh runs: measures, and writes bench.md and bench.svg. Standard library only."""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
LUA = HERE / "onboarding.lua"
TICKS = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024


# --- Processes ---------------------------------------------------------------------------------

def free_port(beside=0):
    """A port that is free, and so are the `beside` after it."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                for n in range(1, beside + 1):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port + n))
            except OSError:
                continue
            return port


def wait_for(port, process):
    for _ in range(500):
        if process.poll() is not None:
            sys.exit(f"{process.args[0]} ended at its start with {process.returncode}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.01)
    sys.exit(f"{process.args[0]} does not listen")


@contextlib.contextmanager
def started(command, port, env=None, log=None):
    """The process, stopped at the end."""
    with open(log or os.devnull, "wb") as out:
        process = subprocess.Popen([str(part) for part in command], env=env, stdout=out, stderr=out)
    try:
        wait_for(port, process)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Bench:
    def __init__(self, options):
        self.options = options
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="bench-"))
        self.folders = [str(self.work)]
        self.redis_port = free_port()
        self.log = self.work / "log"
        self.load_before = os.getloadavg()[0]

    @contextlib.contextmanager
    def redis(self):
        arguments = ["--port", self.redis_port, "--save", "", "--appendonly", "no", "--dir", self.work]
        with started(["redis-server", *arguments], self.redis_port) as process:
            yield process

    def flush(self):
        self.redis_cli("FLUSHALL", "SYNC" if self.redis_major() >= 6 else "")

    def redis_major(self):
        return int(re.search(r"redis_version:(\d+)", self.redis_cli("INFO", "server")).group(1))

    def redis_cli(self, *words):
        command = ["redis-cli", "-p", str(self.redis_port), *[word for word in words if word]]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def environment(self, port, redis, **more):
        env = {
            "PATH": os.environ["PATH"], "HTTP_HOST": "127.0.0.1", "PORT": str(port),
            "DATA_DIR": str(self.work / "data"), "MAX_CONNECTIONS": "2048",
            "MAX_CONNECTIONS_PER_IP": "2048",
            "JWT_SECRET": "bench-secret-bench-secret-bench-secret",
        }
        if redis:
            env["REDIS_URL"] = f"redis://127.0.0.1:{redis}"
        else:
            env["REDIS_ENABLED"] = "false"
        return env | more

    @contextlib.contextmanager
    def ours(self, redis=None, program=None, **more):
        port = free_port()
        env = self.environment(port, redis, **more)
        with started([program or self.options.program], port, env, self.log) as process:
            self.wait_until_it_serves(port, redis)
            yield port, process

    def wait_until_it_serves(self, port, redis):
        for _ in range(300):
            if not redis or self.health(port)["redis"]["connected"]:
                return
            time.sleep(0.01)
        sys.exit("the service does not find Redis")

    @contextlib.contextmanager
    def yardstick(self, name, redis):
        port = free_port()
        command = [pathlib.Path(self.options.peers) / name, port, f"redis://127.0.0.1:{redis}"]
        with started(command, port, None, self.log) as process:
            yield port, process

    def peer(self, redis):
        return self.yardstick("peer", redis)

    def literal(self, redis):
        return self.yardstick("literal", redis)

    def data(self, place):
        """A folder that stays until the end: ext4 is slow for a while where much was deleted."""
        path = tempfile.mkdtemp(prefix="bench-", dir=place)
        self.folders.append(path)
        return path

    def health(self, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return json.load(answer)

    def tool(self, name):
        return str(pathlib.Path(self.options.tools) / name)


def cpu_s(process):
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mib(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def threads(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"Threads:\s+(\d+)", status).group(1))


# --- One measurement each ----------------------------------------------------------------------

def wrk(port, connections, seconds, lua=LUA):
    command = ["wrk", f"-t{min(2, connections)}", f"-c{connections}", f"-d{seconds}s",
               "--timeout", "10s", "-s", str(lua), f"http://127.0.0.1:{port}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"result (.*)", text).group(1)
    return {name: float(value) for name, value in (pair.split("=") for pair in found.split())}


def onboard(server, connections, seconds):
    port, process = server
    before = cpu_s(process)
    result = wrk(port, connections, seconds)
    result["cpu_us"] = (cpu_s(process) - before) / max(result["requests"], 1) * 1e6
    return result


def redis_pairs(bench, seconds):
    """Pairs of SET that Redis takes in one round trip, per second, 32 at a time."""
    requests = 100_000 * seconds
    command = ["redis-benchmark", "-p", str(bench.redis_port), "-c", "32", "-P", "2", "-n",
               str(requests), "-r", "1000000", "-q", "SET", "key:__rand_int__", "x" * 240, "PX", "300000"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(re.findall(r"([\d.]+) requests per second", text)[-1]) / 2


def openssl_floor_us(seconds):
    """OpenSSL's time for the verification and the signature that a certificate cannot do without."""
    command = ["openssl", "speed", "-seconds", str(seconds), "ecdsap256"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = re.search(r"ecdsa \(nistp256\)\s+([\d.]+)s\s+([\d.]+)s\s+([\d.]+)\s+([\d.]+)", text)
    return (1 / float(numbers.group(3)) + 1 / float(numbers.group(4))) * 1e6


def flow(bench, port, connections, devices, prefix):
    command = [bench.tool("load"), "flow", f"127.0.0.1:{port}", str(connections), str(devices), prefix]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"load failed: {done.stderr}")
    words = done.stdout.split()
    return dict(zip(words[::2], map(float, words[1::2])))


def at_rate(bench, port, connections, rate, seconds, prefix):
    load = [bench.tool("load"), "rate", f"127.0.0.1:{port}", connections, rate, seconds, prefix]
    done = subprocess.run([str(word) for word in load], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"load failed: {done.stderr}")
    words = done.stdout.split()
    return dict(zip(words[::2], map(float, words[1::2])))


def slow_rss(bench, server, connections):
    port, process = server
    load = [bench.tool("load"), "slow", f"127.0.0.1:{port}", str(connections)]
    with subprocess.Popen(load, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        time.sleep(0.5)
        return rss_mib(process)


def start_ms(bench, times, port, command, env=None):
    load = [bench.tool("load"), "start", f"127.0.0.1:{port}", str(times), *map(str, command)]
    text = subprocess.run(load, check=True, capture_output=True, text=True, env=env).stdout
    return [float(line) for line in text.split()]


# --- All of them -------------------------------------------------------------------------------

class Series:
    """Figures by name; those of one round stand beside each other."""

    def __init__(self):
        self.figures = {}

    def add(self, name, value):
        self.figures.setdefault(name, []).append(value)
        print(f"  {name}: {value:.4g}", flush=True)

    def median(self, name):
        return statistics.median(self.figures[name])

    def shown(self, name, digits=0):
        values = self.figures.get(name)
        if not values:
            return "not measured"
        number = lambda value: f"{value:,.{digits}f}"
        if len(values) == 1:
            return number(values[0])
        return f"{number(self.median(name))} ({number(min(values))} to {number(max(values))})"

    def ratio(self, ours, theirs):
        """The median of the ratios within each round, which what changes between them leaves alone."""
        pairs = zip(self.figures[ours], self.figures[theirs])
        return statistics.median(a / b for a, b in pairs if b)


CONNECTIONS = [1, 32, 256]
# What is asked of all sides alike, in onboardings a second, and over how many connections.
RATE, RATE_CONNECTIONS = 2_000, 32
TOKENS = [0, 25_000, 50_000, 75_000, 100_000]


def measure(bench, quick):
    series = Series()
    rounds, seconds = (1, 1) if quick else (bench.options.rounds, 2)
    for n in range(rounds):
        print(f"round {n + 1} of {rounds}", flush=True)
        with bench.redis():
            onboarding_round(bench, series, seconds, n)
            rate_round(bench, series, seconds, n)
            flow_round(bench, series, 200 if quick else 1_000, n)
            distance_round(bench, series, seconds, n)
        memory_round(bench, series, seconds, n)
    once(bench, series, 3 if quick else 31)
    return series


def turn(n, *sides):
    """Another one first in each round."""
    return sides[n % len(sides):] + sides[:n % len(sides)]


def onboarding_round(bench, series, seconds, n):
    servers = {"ours": bench.ours, "peer": bench.peer, "literal": bench.literal}
    for connections in CONNECTIONS:
        for side in turn(n, *servers):
            bench.flush()
            with servers[side](bench.redis_port) as server:
                result = onboard(server, connections, seconds)
            check(result, f"{side} at {connections}")
            for what in ("rate", "p50_ms", "p99_ms", "cpu_us"):
                series.add(f"{side} {what} {connections}", result[what])
    bench.flush()
    series.add("redis pairs", redis_pairs(bench, seconds))


def rate_round(bench, series, seconds, n):
    """How long people wait while all sides are asked for the same."""
    servers = {"ours": bench.ours, "peer": bench.peer, "literal": bench.literal}
    for side in turn(n, *servers):
        bench.flush()
        with servers[side](bench.redis_port) as (port, process):
            before = cpu_s(process)
            result = at_rate(bench, port, RATE_CONNECTIONS, RATE, 2 * seconds, f"rate{n}")
            cpu_us = (cpu_s(process) - before) / result["requests"] * 1e6
        series.add(f"{side} steady p50_ms", result["p50_ms"])
        series.add(f"{side} steady p99_ms", result["p99_ms"])
        series.add(f"{side} steady cpu_us", cpu_us)


def check(result, what):
    if result["errors"]:
        print(f"  {what}: {result['errors']:.0f} answers were errors", flush=True)


def flow_round(bench, series, devices, n):
    series.add("openssl floor_us", openssl_floor_us(1))
    # With the record on the disk, where fsync decides, and in memory, where the service does.
    places = [("flow", str(bench.work), devices)]
    if os.path.isdir("/dev/shm"):
        places.append(("flow in memory", "/dev/shm", 10 * devices))
    for name, place, count in places:
        bench.flush()
        with bench.ours(bench.redis_port, DATA_DIR=bench.data(place)) as (port, process):
            before = cpu_s(process)
            result = flow(bench, port, 32, count, f"flow{n}")
            series.add(f"{name} cpu_us", (cpu_s(process) - before) / count * 1e6)
        for what in ("per_second", "p50_ms", "p99_ms"):
            series.add(f"{name} {what}", result[what])


def distance_round(bench, series, seconds, n):
    """Redis is 20 ms away."""
    far = free_port()
    delay = [bench.tool("delay"), far, f"127.0.0.1:{bench.redis_port}", 20]
    sides = {"ours": bench.ours, "peer": bench.peer}
    if bench.options.unbatched:
        sides["unbatched"] = lambda redis: bench.ours(redis, program=bench.options.unbatched)
    with started(delay, far):
        for connections in CONNECTIONS[1:]:
            for side in turn(n, *sides):
                bench.flush()
                with sides[side](far) as server:
                    result = onboard(server, connections, seconds)
                check(result, f"{side} at {connections}, 20 ms away")
                series.add(f"{side} far {connections}", result["rate"])
                series.add(f"{side} far p99_ms {connections}", result["p99_ms"])


def memory_round(bench, series, seconds, n):
    """Without Redis, beside a constant from bare tiny_http."""
    for side in turn(n, "ours", "bare"):
        if side == "ours":
            with bench.ours(MEMORY_MAX_TOKENS="10000000") as server:
                result = onboard(server, 32, seconds)
        else:
            port = free_port(1)
            edge = [bench.tool("edge"), 1, port]
            with started(edge, port + 1) as process:
                result = onboard((port + 1, process), 32, seconds)
        check(result, f"{side} without Redis")
        series.add(f"{side} memory", result["rate"])


def once(bench, series, times):
    """Sizes and the start, which do not wander."""
    print("sizes and starts", flush=True)
    series.add("size_mb", os.path.getsize(bench.options.program) / 1e6)
    series.add("peer size_mb", os.path.getsize(f"{bench.options.peers}/peer") / 1e6)
    for tokens in TOKENS:
        # One address may have no more than three quarters of the memory: so no more than these.
        limit = {"MEMORY_MAX_TOKENS": str(tokens * 4 // 3)} if tokens else {}
        with bench.ours(**limit) as (port, process):
            time.sleep(0.5)
            while bench.health(port)["redis"]["tokenCount"] < tokens - 1:
                wrk(port, 32, 1)
            series.add(f"tokens {tokens}", rss_mib(process))
    with bench.redis():
        for side, server in (("ours", bench.ours), ("peer", bench.peer)):
            with server(bench.redis_port) as (port, process):
                time.sleep(6)  # tiny_http's spare threads end after five idle seconds
                series.add(f"{side} idle_mib", rss_mib(process))
                series.add(f"{side} threads", threads(process))
                series.add(f"{side} slow_mib", slow_rss(bench, (port, process), 1000))
        port = free_port()
        env = bench.environment(port, bench.redis_port)
        for value in start_ms(bench, times, port, [bench.options.program], env):
            series.add("ours start_ms", value)
        port = free_port()
        url = f"redis://127.0.0.1:{bench.redis_port}"
        for value in start_ms(bench, times, port, [f"{bench.options.peers}/peer", port, url]):
            series.add("peer start_ms", value)


# --- What comes of it --------------------------------------------------------------------------

def rows(series):
    """(what, ours, yardstick, ratio)"""
    def against(side, name, what, key, digits):
        ratio = series.ratio(f"ours {key}", f"{side} {key}")
        yardstick = f"{series.shown(f'{side} {key}', digits)} {name}"
        return (what, series.shown(f"ours {key}", digits), yardstick, f"{ratio:.2f}")

    def alone(what, key, digits, yardstick=""):
        return (what, series.shown(key, digits), yardstick, "")

    for what, key, digits in (("onboarding with Redis, requests/s", "rate", 0),
                              ("p99 of the same, ms", "p99_ms", 2),
                              ("CPU per onboarding, µs", "cpu_us", 1)):
        for connections in CONNECTIONS:
            for side, name in (("peer", "axum"), ("literal", "tiny_http")):
                yield against(side, name, f"{what}, {connections} connections",
                              f"{key} {connections}", digits)
    for what, key in (("p50", "p50_ms"), ("p99", "p99_ms"), ("CPU", "cpu_us")):
        for side, name in (("peer", "axum"), ("literal", "tiny_http")):
            unit = "µs" if key == "cpu_us" else "ms"
            yield against(side, name, f"{what} at a steady {RATE:,} requests/s, {unit}",
                          f"steady {key}", 2)
    yield ("Redis alone: two SETs a round trip, pairs/s", series.shown("ours rate 32"),
           series.shown("redis pairs") + " redis-benchmark",
           f"{series.ratio('ours rate 32', 'redis pairs'):.2f}")
    yield alone("whole flow to a P-256 certificate, flows/s", "flow per_second", 0,
                f"{series.shown('openssl floor_us', 1)} µs: OpenSSL's verify and sign")
    yield alone("its CPU in the service, µs", "flow cpu_us", 0)
    yield alone("its p99, ms", "flow p99_ms", 2)
    if "flow in memory per_second" in series.figures:
        yield alone("whole flow, record in /dev/shm, flows/s", "flow in memory per_second", 0)
        yield alone("its CPU in the service, µs", "flow in memory cpu_us", 0)
    yield alone("idle, MiB", "ours idle_mib", 1, series.shown("peer idle_mib", 1) + " axum")
    yield alone("threads", "ours threads", 0, series.shown("peer threads") + " axum")
    yield alone("with 1,000 slow connections, MiB", "ours slow_mib", 1,
                series.shown("peer slow_mib", 1) + " axum")
    grown = series.median(f"tokens {TOKENS[-1]}") - series.median("tokens 0")
    yield ("100,000 tokens in memory, MiB above idle", f"{grown:.1f}", "", "")
    yield alone("start to first answer, CA present, ms", "ours start_ms", 1,
                series.shown("peer start_ms", 1) + " axum")
    yield alone("program, MB", "size_mb", 2,
                series.shown("peer size_mb", 2) + " axum, without TLS and CA")
    for connections in CONNECTIONS[1:]:
        ideal = connections / 0.021
        share = series.median(f"ours far {connections}") / ideal
        unbatched = f"; {series.shown(f'unbatched far {connections}')} batches of one"
        yield (f"onboarding, Redis 20 ms away, requests/s, {connections} connections",
               series.shown(f"ours far {connections}"),
               f"{ideal:,.0f} at a round trip each; {series.shown(f'peer far {connections}')} axum"
               + (unbatched if f"unbatched far {connections}" in series.figures else ""),
               f"{share:.2f}")
    yield ("onboarding without Redis, requests/s", series.shown("ours memory"),
           series.shown("bare memory") + " bare tiny_http, a constant",
           f"{series.ratio('ours memory', 'bare memory'):.2f}")


def cpu_model():
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def markdown(bench, table, quick):
    redis = re.search(r"v=(\S+)", subprocess.run(["redis-server", "--version"], capture_output=True,
                                                 text=True).stdout).group(1)
    before = bench.load_before
    lines = [
        "# Measurements", "",
        "Written by `scripts/bench.sh`" + (" --quick: **one short round, which means nothing**" if quick else "")
        + f" on {datetime.date.today().isoformat()}.", "",
        f"{os.cpu_count()} processors ({cpu_model()}), shared by the load, the server and Redis {redis}; "
        f"load average before the run: {before:.1f}. "
        + ("**The machine was busy with other work: ranges are wide, and no ratio here decides "
           "anything.** " if before > 1 else "") +
        "Each figure is the median of the rounds, with the lowest and the highest; a ratio is the median "
        "of the ratios within each round, so what slows a whole round does not move it. In each round "
        "service and yardsticks run one after the other, each freshly started on an empty Redis, and "
        "another one first in each round. All log a line for each token. The limits of "
        "connections were raised to 2,048 for one address; everything else is the default.", "",
        "*axum* is `tools/peer`: axum, tokio and the redis crate, the same token, the same six "
        "commands in one pipeline, the same line in the log, and none of the rest. *tiny_http* is the "
        "same with `tiny_http` on the network and four workers that block, one request at a time, "
        "each over a connection to Redis of its own; not all of many connections get a turn there, so "
        "that its percentiles are of those that do. The times are of `wrk`, at a steady rate of "
        f"`tools`' `load`: {RATE_CONNECTIONS} connections in turn send each request at its time, and a "
        "request's time counts from then. The memory is `VmRSS`, the CPU is `/proc/PID/stat`. Folders "
        "of data stay until the end, since ext4 is slow for a while where much was deleted.", "",
        "![throughput, latency and memory](bench.svg)", "",
        "| what | here | yardstick | ratio |", "|---|---|---|---|",
    ]
    lines.extend(f"| {' | '.join(row)} |" for row in table)
    return "\n".join(lines) + "\n"


# --- The picture -------------------------------------------------------------------------------

COLOURS = {"here": "#1f6feb", "axum": "#c2410c"}


def panel(left, title, unit, labels, lines):
    """A chart of 240 by 170 whose points stand at equal distances."""
    top = max(max(values) for values in lines.values()) * 1.1 or 1
    x = lambda n: left + 44 + n * 190 / (len(labels) - 1)
    y = lambda value: 200 - value / top * 150
    yield f'<text x="{left + 44}" y="24" font-weight="bold">{title}</text>'
    for share in (0, 0.5, 1):
        value = top / 1.1 * share
        shown = f"{value / 1000:.0f}k" if top > 5000 else f"{value:.3g}"
        yield f'<path d="M{left + 44} {y(value):.1f}h200" stroke="#8884"/>'
        yield f'<text x="{left + 38}" y="{y(value) + 4:.1f}" text-anchor="end">{shown}</text>'
    for n, label in enumerate(labels):
        yield f'<text x="{x(n):.1f}" y="218" text-anchor="middle">{label}</text>'
    yield f'<text x="{left + 139}" y="236" text-anchor="middle">{unit}</text>'
    for name, values in lines.items():
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(values))
        yield f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
        for n, value in enumerate(values):
            yield f'<circle cx="{x(n):.1f}" cy="{y(value):.1f}" r="3" fill="{COLOURS[name]}"/>'


def picture(series):
    sides = {"here": "ours", "axum": "peer"}
    over = lambda what: {name: [series.median(f"{side} {what} {c}") for c in CONNECTIONS]
                         for name, side in sides.items()}
    memory = {"here": [series.median(f"tokens {tokens}") for tokens in TOKENS]}
    parts = [
        *panel(0, "onboardings/s", "connections", CONNECTIONS, over("rate")),
        *panel(270, "p99, ms", "connections", CONNECTIONS, over("p99_ms")),
        *panel(540, "memory, MiB", "tokens held", ["0", "25k", "50k", "75k", "100k"], memory),
    ]
    for n, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<rect x="{640 + n * 80}" y="246" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{655 + n * 80}" y="255">{name}</text>')
    head = ('<svg xmlns="http://www.w3.org/2000/svg" width="800" height="264" viewBox="0 0 800 264" '
            'font-family="sans-serif" font-size="12" fill="#777">')
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser()
    for name in ("program", "unbatched", "tools", "peers", "out"):
        parser.add_argument(f"--{name}", required=name != "unbatched")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bench = Bench(options)
    try:
        series = measure(bench, options.quick)
        table = list(rows(series))
        out = pathlib.Path(options.out)
        (out / "bench.md").write_text(markdown(bench, table, options.quick))
        (out / "bench.svg").write_text(picture(series))
        for what, ours, yardstick, ratio in table:
            print(f"{what:62} {ours:28} {yardstick:40} {ratio}")
    finally:
        for folder in bench.folders:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
