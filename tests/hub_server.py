#!/usr/bin/env python3
"""Loopback server that speaks the Hugging Face Hub HTTP API (read + write) for huggingface_hub 2.4.

start:  python hub_server.py --root DIR --port 8765 --token hf_alice=alice:write --token hf_bob=bob:write
        (prints "READY http://127.0.0.1:PORT"; --port 0 picks a free one; --test-hooks adds POST /_test/fault, GET /_test/log)
client: HF_ENDPOINT=http://127.0.0.1:8765 HF_TOKEN=hf_alice HF_HUB_DISABLE_XET=1, all set BEFORE huggingface_hub is imported
        (start with --xet, which needs lz4, to leave HF_HUB_DISABLE_XET unset: hf_xet has no fallback to LFS)

needs:  starlette uvicorn pyyaml (and lz4 for --xet)

On disk: ROOT/objects/ab/<sha256> (every file's bytes, named by their sha256), ROOT/repos/<type>s/<ns>/<name>.json
(refs, commits, trees, discussions), ROOT/tmp (uploads under way).  One process; a lock serialises writes.
"""
import argparse, asyncio, base64, datetime, fnmatch, hashlib, hmac, json, math, os, re, secrets, socket, struct, tempfile, time
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LFS_EXT = ("7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar "
           "safetensors tar tflite tgz wasm xz zip zst").split()
GITATTRIBUTES = "".join(f"*.{e} filter=lfs diff=lfs merge=lfs -text\n" for e in LFS_EXT).encode()
REGULAR_MAX = 10 * 1024 * 1024          # the Hub refuses larger files outside LFS
CHUNK = 1 << 20


class Fail(Exception):
    def __init__(self, status, message, code=None, headers=None, body=None):
        self.status, self.message, self.code, self.headers, self.body = status, message, code, headers or {}, body

    def response(self):
        h = {"X-Error-Message": self.message, **self.headers}
        if self.code:
            h["X-Error-Code"] = self.code
        return JSONResponse(self.body or {"error": self.message}, self.status, headers=h)


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.") + "000Z"


def git_sha1(data: bytes, kind="blob"):
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def pointer(sha256, size):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Store:
    def __init__(self, root):
        self.root = Path(root)
        for d in ("objects", "repos", "tmp", "xorbs", "xet"):
            (self.root / d).mkdir(parents=True, exist_ok=True)
        key = self.root / "secret"
        if not key.exists():
            key.write_bytes(secrets.token_bytes(32))
        self.key, self.lock = key.read_bytes(), asyncio.Lock()

    # -- objects ----------------------------------------------------------------
    def obj(self, sha256):
        return self.root / "objects" / sha256[:2] / sha256

    def has(self, sha256, size=None):
        p = self.obj(sha256)
        return p.exists() and (size is None or p.stat().st_size == size)

    def put_bytes(self, data):
        sha = hashlib.sha256(data).hexdigest()
        if not self.has(sha):
            fd, tmp = tempfile.mkstemp(dir=self.root / "tmp")
            with os.fdopen(fd, "wb") as f:
                f.write(data)
            self.adopt(tmp, sha)
        return sha

    def adopt(self, tmp, sha256):
        dst = self.obj(sha256)
        dst.parent.mkdir(exist_ok=True)
        os.replace(tmp, dst)

    # -- repos ------------------------------------------------------------------
    def path(self, rtype, rid):
        if not re.fullmatch(r"[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+", rid) or ".." in rid:
            raise Fail(400, f"Invalid repo id {rid}")
        return self.root / "repos" / (rtype + "s") / (rid + ".json")

    def load(self, rtype, rid):
        p = self.path(rtype, rid)
        return json.loads(p.read_text()) if p.exists() else None

    def save(self, repo):
        p = self.path(repo["type"], repo["id"])
        p.parent.mkdir(parents=True, exist_ok=True)
        tmp = p.with_name(p.name + f".{secrets.token_hex(4)}.tmp")
        tmp.write_text(json.dumps(repo))
        os.replace(tmp, p)

    def commit(self, repo, ref, tree, title, description, author):
        parent = repo["refs"].get(ref)
        body = json.dumps([parent, sorted((k, v["oid"]) for k, v in tree.items()), title, author, time.time_ns()]).encode()
        oid = git_sha1(body, "commit")
        repo["commits"][oid] = dict(parent=parent, title=title, message=description, author=author, date=now(), tree=tree)
        repo["refs"][ref] = oid
        return oid

    # -- signed, token-free urls (stand in for S3 / CDN presigned urls) ------------
    def sign(self, path, ttl=3600):
        exp = int(time.time()) + ttl
        return f"{path}?exp={exp}&sig={hmac.new(self.key, f'{path}|{exp}'.encode(), 'sha256').hexdigest()}"

    def check(self, request, path):
        exp, sig = request.query_params.get("exp", "0"), request.query_params.get("sig", "")
        good = hmac.new(self.key, f"{path}|{exp}".encode(), "sha256").hexdigest()
        if not hmac.compare_digest(sig, good) or int(exp) < time.time():
            raise Fail(403, "Request signature is invalid or has expired")


class Hub:
    def __init__(self, store, tokens, base, cdn, multipart_over, chunk_size, hooks, xet=False):
        self.s, self.tokens, self.base, self.cdn, self.xet = store, tokens, base, cdn, xet
        self.multipart_over, self.chunk_size, self.hooks, self.faults, self.log = multipart_over, chunk_size, hooks, [], []

    # ---------------------------------------------------------------- Xet CAS, v1 (only with --xet)
    def xet_token(self, scope, rid):
        exp = int(time.time()) + 900
        return f"{scope}.{exp}." + hmac.new(self.s.key, f"{scope}|{exp}".encode(), "sha256").hexdigest(), exp

    async def cas(self, rq, m, seg):
        try:
            scope, exp, sig = rq.headers.get("authorization", "").removeprefix("Bearer ").split(".")
        except ValueError:
            raise Fail(401, "Missing or malformed Xet token")
        if not hmac.compare_digest(sig, hmac.new(self.s.key, f"{scope}|{exp}".encode(), "sha256").hexdigest()) or int(exp) < time.time():
            raise Fail(401, "Invalid or expired Xet token")
        if m == "POST" and seg[1] in ("xorbs", "shards") and scope != "write":
            raise Fail(403, "This Xet token cannot write")
        match seg:
            case ["v1", "xorbs", _, h] if m == "POST" and re.fullmatch("[0-9a-f]{64}", h):
                tmp, *_ = await self.receive(rq, 1 << 28)
                dst, new = self.s.root / "xorbs" / h, not (self.s.root / "xorbs" / h).exists()
                os.replace(tmp, dst)
                return JSONResponse(dict(was_inserted=new))
            case ["v1", "shards"] if m == "POST":
                data = await rq.body()
                return JSONResponse(dict(result=await asyncio.to_thread(self.xet_register, data)))
            case ["v1", "reconstructions", h] if m == "GET":
                return JSONResponse(self.xet_reconstruction(h, rq.headers.get("range")))
        raise Fail(404, "Not found")    # v2 routes: hf_xet falls back to v1; v1/chunks: no global dedup

    def xet_chunks(self, xorb):
        """(offset, stored length, scheme, length) of every chunk in a serialised xorb"""
        p, out = 0, []
        while p + 8 <= len(xorb) and xorb[p] == 0:
            n, scheme, size = int.from_bytes(xorb[p + 1:p + 4], "little"), xorb[p + 4], int.from_bytes(xorb[p + 5:p + 8], "little")
            out.append((p, n + 8, scheme, size))
            p += n + 8
        return out

    def xet_unpack(self, xorb, chunk):
        import lz4.frame
        p, n, scheme, size = chunk
        d = xorb[p + 8:p + n]
        if scheme:
            d = lz4.frame.decompress(d)
        if scheme == 2:                  # the bytes of 4-byte words, grouped by position
            out, at = bytearray(size), 0
            for i in range(4):
                k = len(range(i, size, 4))
                out[i::4] = d[at:at + k]
                at += k
            d = bytes(out)
        if len(d) != size:
            raise Fail(400, "Bad chunk in a xorb")
        return d

    def xet_register(self, b):
        """read a shard (48-byte records), rebuild each file from its xorbs, check its sha256, keep it"""
        hx, p, done = lambda x: "".join("%016x" % v for v in struct.unpack("<4Q", x)), 48, 0
        while b[p:p + 32] != b"\xff" * 32:
            h, flags, n = hx(b[p:p + 32]), *struct.unpack("<II", b[p + 32:p + 40])
            terms = [(hx(b[q:q + 32]), *struct.unpack("<III", b[q + 36:q + 48])) for q in range(p + 48, p + 48 * (n + 1), 48)]
            p += 48 * (1 + n * (1 + (flags >> 31 & 1)))
            if not flags >> 30 & 1:
                raise Fail(400, "A file without a sha256 cannot be committed")
            sha, p = hx(b[p:p + 32]), p + 48
            fd, tmp = tempfile.mkstemp(dir=self.s.root / "tmp")
            digest = hashlib.sha256()
            with os.fdopen(fd, "wb") as f:
                for x, size, i, j in terms:
                    if not (xp := self.s.root / "xorbs" / x).exists():
                        raise Fail(400, f"Unknown xorb {x}")
                    xorb, got = xp.read_bytes(), 0
                    for c in self.xet_chunks(xorb)[i:j]:
                        d = self.xet_unpack(xorb, c)
                        got += len(d); digest.update(d); f.write(d)
                    if got != size:
                        raise Fail(400, "A segment has the wrong length")
            if digest.hexdigest() != sha:
                os.unlink(tmp)
                raise Fail(400, "BadDigest: the rebuilt file does not have the sha256 it was registered with")
            self.s.adopt(tmp, sha)
            (self.s.root / "xet" / h).write_text(json.dumps(dict(sha256=sha, terms=terms)))
            (self.s.root / "xet" / ("sha256-" + sha)).write_text(h)
            done = 1
        return done

    def xet_hash(self, sha256):
        p = self.s.root / "xet" / ("sha256-" + sha256)
        return p.read_text() if self.xet and p.exists() else None

    def xet_reconstruction(self, h, rng):
        if not re.fullmatch("[0-9a-f]{64}", h) or not (p := self.s.root / "xet" / h).exists():
            raise Fail(404, "File not found")
        terms, at, off, out, fetch = json.loads(p.read_text())["terms"], 0, None, [], {}
        total = sum(t[1] for t in terms)
        a, z = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", rng).groups()) if rng else (0, total - 1)
        if a >= total:
            raise Fail(416, "Range Not Satisfiable")
        for x, size, i, j in terms:
            if at + size > a and at <= z:
                off = a - at if off is None else off
                c = self.xet_chunks((self.s.root / "xorbs" / x).read_bytes())
                out.append(dict(hash=x, unpacked_length=size, range=dict(start=i, end=j)))
                e = dict(range=dict(start=i, end=j), url=self.cdn + self.s.sign(f"/lfs/xorb/{x}"), url_range=dict(start=c[i][0], end=c[j - 1][0] + c[j - 1][1] - 1))
                if all(y["range"] != e["range"] for y in fetch.setdefault(x, [])):
                    fetch[x].append(e)
            at += size
        return dict(offset_into_first_range=off or 0, terms=out, fetch_info=fetch)

    # ---------------------------------------------------------------- auth
    def user(self, request):
        auth = request.headers.get("authorization")
        if auth is None:
            return None
        u = self.tokens.get(auth.removeprefix("Bearer ").strip())
        if u is None:
            raise Fail(401, "Invalid credentials in Authorization header")
        return u

    def need_user(self, request):
        u = self.user(request)
        if u is None:
            raise Fail(401, "Invalid username or password.")
        return u

    def may_write(self, u, ns):
        return u is not None and u["role"] == "write" and (ns == u["name"] or ns in u["orgs"])

    def repo(self, request, rtype, rid, write=False, any_user=False):
        u = self.user(request)
        repo = self.s.load(rtype, rid)
        ns = rid.split("/")[0]
        if repo is None or (repo["private"] and not (u and (ns == u["name"] or ns in u["orgs"]))):
            if u is None:   # the Hub hides "missing" and "private" behind one 401; X-Error-Code is what makes a client on
                raise Fail(401, "Invalid username or password.", "RepoNotFound")   # plain http say RepositoryNotFoundError
            raise Fail(404, "Repository not found", "RepoNotFound")
        if any_user and u is None:
            raise Fail(401, "Invalid username or password.")
        if write and not self.may_write(u, ns):
            if u is None:
                raise Fail(401, "Invalid username or password.")
            raise Fail(403, f"You don't have the rights to write to {rid} with this token")
        return repo, u

    def rev(self, repo, rev):
        for name in (rev, f"refs/heads/{rev}", f"refs/tags/{rev}"):
            if name in repo["refs"]:
                return repo["refs"][name]
        hits = [c for c in repo["commits"] if re.fullmatch(r"[0-9a-f]{7,40}", rev) and c.startswith(rev)]
        if len(hits) == 1:
            return hits[0]
        raise Fail(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def url(self, repo):
        return self.base + "/" + ("" if repo["type"] == "model" else repo["type"] + "s/") + repo["id"]

    # ---------------------------------------------------------------- dispatch
    async def __call__(self, request: Request):
        raw = request.scope["raw_path"].decode().split("?")[0]
        seg = [unquote(x) for x in raw.strip("/").split("/")]
        m = request.method
        if self.hooks and seg[0] != "_test":
            self.log.append(dict(method=m, path=raw, query=str(request.url.query), auth="authorization" in request.headers,
                                 range=request.headers.get("range"), host=request.headers.get("host")))
        if self.hooks and seg[0] != "_test" and (fault := self.request_fault(m, raw)):
            if "status" in fault:
                await request.body()
                return JSONResponse({"error": "test hook"}, fault["status"])
            return StreamingResponse(cut_answer(request, fault["drop"]), headers={"Content-Length": "100"})
        try:
            return await self.route(request, m, seg, raw)
        except Fail as e:
            return e.response()
        except ClientDisconnect:
            return Response(status_code=499)

    def request_fault(self, m, raw):
        """a fault for requests: {"method", "path" (regex), "status" or "drop" (bytes to read before hanging up), "times"}"""
        for f in self.faults:
            if "path" in f and f.get("times", 1) > 0 and m == f["method"] and re.search(f["path"], raw):
                f["times"] = f.get("times", 1) - 1
                return f

    async def route(self, rq, m, seg, raw):
        match seg:
            case ["_test", what] if self.hooks:
                if what == "fault":
                    self.faults.append(await rq.json()); return JSONResponse({})
                log, self.log = self.log, []
                return JSONResponse(log)
            case ["api", "whoami-v2"]:
                u = self.need_user(rq)
                return JSONResponse(dict(type="user", id=git_sha1(u["name"].encode())[:24], name=u["name"], fullname=u["name"],
                    email=None, emailVerified=True, canPay=False, isPro=False, avatarUrl="", orgs=[dict(type="org", name=o, fullname=o) for o in u["orgs"]],
                    auth=dict(type="access_token", accessToken=dict(displayName="test", role=u["role"], createdAt=now()))))
            case ["api", "agent-harnesses"]:
                return JSONResponse(dict(standardEnvVars=[], harnesses={}))
            case ["api", "validate-yaml"] if m == "POST":
                errors, warn, _ = card((await rq.json())["content"])
                return JSONResponse(dict(errors=[dict(message=e) for e in errors], warnings=[dict(message=w) for w in warn]), 400 if errors else 200)
            case ["api", "repos", "create"] if m == "POST":
                return await self.create(rq)
            case ["api", "repos", "delete"] if m == "DELETE":
                d = await rq.json()
                u = self.need_user(rq)
                repo, _ = self.repo(rq, d.get("type") or "model", f"{d.get('organization') or u['name']}/{d['name']}", write=True)
                self.s.path(repo["type"], repo["id"]).unlink()
                return JSONResponse({})
            case ["api", ("models" | "datasets" | "spaces") as t, ns, name, *rest]:
                return await self.api(rq, m, t[:-1], f"{ns}/{name}", rest)
            case ["v1", "telemetry"]:      # hf_xet posts this at the root of the CAS origin
                return JSONResponse({})
            case ["cas", *rest] if self.xet:
                return await self.cas(rq, m, rest)
            case ["lfs", *_]:
                return await self.lfs_data(rq, m, seg, raw)
        t = "model"
        if seg[0] in ("datasets", "spaces"):
            t, seg = seg[0][:-1], seg[1:]
        match seg:
            case [ns, name, "info", "lfs", "objects", "batch"] if m == "POST" and name.endswith(".git"):
                return await self.lfs_batch(rq, t, f"{ns}/{name[:-4]}")
            case [ns, name, "info", "lfs", "verify"] if m == "POST" and name.endswith(".git"):
                self.repo(rq, t, f"{ns}/{name[:-4]}", any_user=True)
                d = await rq.json()
                if not self.s.has(d["oid"], d["size"]):
                    raise Fail(404, "Object not found")
                return JSONResponse({})
            case [ns, name, "resolve", rev, *path] if m in ("GET", "HEAD") and path:
                return self.resolve(rq, m, t, f"{ns}/{name}", rev, "/".join(path))
        raise Fail(404, "Sorry, we can't find the page you are looking for.")

    # ---------------------------------------------------------------- repos
    async def create(self, rq):
        u, d = self.need_user(rq), await rq.json()
        ns, t = d.get("organization") or u["name"], d.get("type") or "model"
        rid = f"{ns}/{d['name']}"
        if not self.may_write(u, ns):
            raise Fail(403, f"You don't have the rights to create a {t} under the namespace \"{ns}\"")
        if t == "space" and d.get("sdk") not in ("gradio", "docker", "static"):
            raise Fail(400, "A space needs an sdk: gradio, docker or static")
        async with self.s.lock:
            repo = self.s.load(t, rid)
            if repo is not None:      # create_repo(exist_ok=True) reads "url" from this 409 body
                raise Fail(409, f"You already created this {t} repo", body=dict(error=f"You already created this {t} repo", url=self.url(repo)))
            private = d.get("visibility", "private" if d.get("private") else "public") == "private"
            repo = dict(id=rid, type=t, private=private, gated=False, createdAt=now(), refs={}, commits={}, discussions=[])
            sha = self.s.put_bytes(GITATTRIBUTES)
            tree = {".gitattributes": dict(sha256=sha, size=len(GITATTRIBUTES), oid=git_sha1(GITATTRIBUTES), lfs=False)}
            self.s.commit(repo, "refs/heads/main", tree, "initial commit", "", u["name"])
            self.s.save(repo)
        return JSONResponse(dict(url=self.url(repo), name=rid, id=git_sha1(rid.encode())[:24]))

    async def api(self, rq, m, t, rid, rest):
        q = rq.query_params
        match rest:
            case [] | ["revision", _] if m == "GET":
                repo, _ = self.repo(rq, t, rid)
                return JSONResponse(self.info(repo, self.rev(repo, rest[1] if rest else "main"), q.get("blobs") in ("True", "true", "1")))
            case ["preupload", rev] if m == "POST":
                pr = q.get("create_pr") == "1"
                repo, _ = self.repo(rq, t, rid, write=not pr, any_user=True)
                return JSONResponse(self.preupload(repo, self.rev(repo, rev), await rq.json()))
            case ["commit", rev] if m == "POST":
                return await self.commit(rq, t, rid, rev)
            case ["tree", rev, *path] if m == "GET":
                repo, _ = self.repo(rq, t, rid)
                return self.tree(rq, repo, self.rev(repo, rev), "/".join(path))
            case ["paths-info", rev] if m == "POST":
                repo, _ = self.repo(rq, t, rid)
                tree = repo["commits"][self.rev(repo, rev)]["tree"]
                paths = parse_qs((await rq.body()).decode()).get("paths", [])
                return JSONResponse([self.entry(p, tree[p]) for p in paths if p in tree])
            case ["refs"] if m == "GET":
                repo, _ = self.repo(rq, t, rid)
                pick = lambda pre: [dict(name=k[len(pre):], ref=k, targetCommit=v) for k, v in repo["refs"].items() if k.startswith(pre)]
                return JSONResponse(dict(branches=pick("refs/heads/"), tags=pick("refs/tags/"), converts=[],
                                         pullRequests=[dict(r, name=r["ref"]) for r in pick("refs/pr/")]))
            case ["commits", rev] if m == "GET":
                repo, _ = self.repo(rq, t, rid)
                out, oid = [], self.rev(repo, rev)
                while oid:
                    c = repo["commits"][oid]
                    out.append(dict(id=oid, title=c["title"], message=c["message"], authors=[dict(user=c["author"])], date=c["date"]))
                    oid = c["parent"]
                return JSONResponse(out)
            case [("branch" | "tag") as kind, name] if m in ("POST", "DELETE"):
                async with self.s.lock:
                    repo, _ = self.repo(rq, t, rid, write=True)
                    d = await rq.json() if m == "POST" and (await rq.body()) else {}
                    ref = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{d.get('tag', name)}"
                    if m == "POST":
                        if ref in repo["refs"]:
                            raise Fail(409, f"Reference {ref} already exists")
                        repo["refs"][ref] = self.rev(repo, d.get("startingPoint") or "main" if kind == "branch" else name)
                    elif repo["refs"].pop(ref, None) is None:
                        raise Fail(404, f"Invalid rev id: {name}", "RevisionNotFound")
                    self.s.save(repo)
                return JSONResponse({})
            case ["discussions"] if m == "POST":
                async with self.s.lock:
                    repo, u = self.repo(rq, t, rid, any_user=True)
                    d = await rq.json()
                    n = self.new_discussion(repo, u, d["title"], d.get("description"), bool(d.get("pullRequest")), "draft")
                    self.s.save(repo)
                return JSONResponse(dict(num=n, url=f"{self.url(repo)}/discussions/{n}"))
            case ["discussions", n] if m == "GET":
                repo, _ = self.repo(rq, t, rid)
                if not 0 < int(n) <= len(repo["discussions"]):
                    raise Fail(404, "Discussion not found")
                return JSONResponse(repo["discussions"][int(n) - 1])
            case ["discussions", n, ("merge" | "status") as act] if m == "POST":
                async with self.s.lock:
                    repo, u = self.repo(rq, t, rid, write=True)
                    d, body = repo["discussions"][int(n) - 1], (await rq.json() if await rq.body() else {}) or {}
                    if act == "status":
                        d["status"] = body["status"]
                    else:
                        d["status"], tree = "merged", repo["commits"][repo["refs"][f"refs/pr/{n}"]]["tree"]
                        d["changes"]["mergeCommitId"] = self.s.commit(repo, "refs/heads/main", tree, f"{d['title']} (#{n})", "", u["name"])
                    self.s.save(repo)
                return JSONResponse(dict(newStatus=d["status"]) if act == "status" else {})
            case ["auth-check"]:
                self.repo(rq, t, rid)
                return JSONResponse({})
            case [("xet-read-token" | "xet-write-token") as k, rev] if m == "GET" and self.xet:
                w = k == "xet-write-token"
                self.repo(rq, t, rid, write=w and q.get("create_pr") != "1", any_user=w)
                tok, exp = self.xet_token("write" if w else "read", rid)
                return JSONResponse(dict(accessToken=tok, exp=exp, casUrl=self.base + "/cas"), headers={
                    "X-Xet-Cas-Url": self.base + "/cas", "X-Xet-Access-Token": tok, "X-Xet-Token-Expiration": str(exp)})
        raise Fail(404, f"No such route for {t} {rid}: {m} {'/'.join(rest)}")

    def info(self, repo, oid, blobs):
        c = repo["commits"][oid]
        tree, meta = c["tree"], {}
        if "README.md" in tree:
            _, _, meta = card(self.s.obj(tree["README.md"]["sha256"]).read_bytes().decode("utf-8", "replace"))
        tags = list(meta.get("tags") or []) + [x for x in (meta.get("library_name"),) if x] + ([f"license:{meta['license']}"] if meta.get("license") else [])
        sib = [dict(rfilename=p) | (dict(size=f["size"], blobId=f["oid"]) | (dict(lfs=dict(sha256=f["sha256"], size=f["size"],
               pointerSize=len(pointer(f["sha256"], f["size"])))) if f["lfs"] else {}) if blobs else {}) for p, f in sorted(tree.items())]
        d = dict(_id=git_sha1(repo["id"].encode())[:24], id=repo["id"], author=repo["id"].split("/")[0], sha=oid, private=repo["private"],
                 gated=repo["gated"], disabled=False, createdAt=repo["createdAt"], lastModified=c["date"], downloads=0, likes=0,
                 tags=list(dict.fromkeys(tags)), cardData=meta or None, siblings=sib, usedStorage=sum(f["size"] for f in tree.values()))
        if repo["type"] == "model":
            d |= dict(modelId=repo["id"], pipeline_tag=meta.get("pipeline_tag"), library_name=meta.get("library_name"), spaces=[])
        return d

    def entry(self, path, f):
        e = dict(type="file", oid=f["oid"], size=f["size"], path=path)
        if f["lfs"]:
            e["lfs"] = dict(oid=f["sha256"], size=f["size"], pointerSize=len(pointer(f["sha256"], f["size"])))
        if f.get("xet"):
            e["xetHash"] = f["xet"]
        return e

    def tree(self, rq, repo, oid, sub):
        tree, pre, out, dirs = repo["commits"][oid]["tree"], (sub + "/") if sub else "", [], set()
        rec = rq.query_params.get("recursive", "").lower() in ("true", "1")
        for p, f in sorted(tree.items()):
            if not p.startswith(pre):
                continue
            parts = p[len(pre):].split("/")
            for i in range(1, len(parts) if rec else min(len(parts), 2)):
                dirs.add(pre + "/".join(parts[:i]))
            if rec or len(parts) == 1:
                out.append(self.entry(p, f))
        if sub and not out and not dirs:
            raise Fail(404, f"{sub} does not exist on \"{oid}\"", "EntryNotFound")
        out = [dict(type="directory", oid=git_sha1(d.encode(), "tree"), size=0, path=d) for d in sorted(dirs)] + out
        start, n = int(rq.query_params.get("cursor", 0)), 1000
        h = {} if start + n >= len(out) else {"Link": f'<{str(rq.url.include_query_params(cursor=start + n))}>; rel="next"'}
        return JSONResponse(out[start:start + n], headers=h)

    # ---------------------------------------------------------------- upload
    def preupload(self, repo, oid, d):
        tree = repo["commits"][oid]["tree"]
        attrs = self.s.obj(tree[".gitattributes"]["sha256"]).read_text() if ".gitattributes" in tree else ""
        pats = [ln.split()[0] for ln in attrs.splitlines() if "filter=lfs" in ln]
        ign = d.get("gitIgnore")
        if ign is None and ".gitignore" in tree:
            ign = self.s.obj(tree[".gitignore"]["sha256"]).read_text()
        ign = [x.strip().rstrip("/") for x in (ign or "").splitlines() if x.strip() and not x.startswith("#")]
        out = []
        for f in d["files"]:
            p, base = f["path"], f["path"].rsplit("/", 1)[-1]
            lfs = f["size"] > REGULAR_MAX or any(fnmatch.fnmatch(base, x) or fnmatch.fnmatch(p, x) for x in pats) \
                or b"\0" in base64.b64decode(f.get("sample") or "")
            e = dict(path=p, uploadMode="lfs" if lfs else "regular",
                     shouldIgnore=any(fnmatch.fnmatch(base, x) or fnmatch.fnmatch(p, x) or p.startswith(x + "/") for x in ign))
            if p in tree:      # lets the client skip unchanged files: sha256 for LFS, git blob sha1 otherwise
                e["oid"] = tree[p]["sha256"] if tree[p]["lfs"] else tree[p]["oid"]
            out.append(e)
        return dict(files=out, commitOid=oid)

    async def lfs_batch(self, rq, t, rid):
        repo, u = self.repo(rq, t, rid, any_user=True)      # write rights are checked at commit (a PR needs none)
        d, objs = await rq.json(), []
        if d.get("operation") != "upload" or d.get("hash_algo", "sha256") != "sha256":
            raise Fail(400, "Only sha256 uploads are supported")
        transfer = "basic"
        prefix = "" if t == "model" else t + "s/"
        for o in d["objects"]:
            oid, size = o["oid"], o["size"]
            e = dict(oid=oid, size=size, authenticated=True)
            if not re.fullmatch(r"[0-9a-f]{64}", oid):
                e = dict(oid=oid, size=size, error=dict(code=422, message="Invalid oid"))
            elif not self.s.has(oid, size):
                verify = dict(href=f"{self.base}/{prefix}{rid}.git/info/lfs/verify", header={})
                if size > self.multipart_over and "multipart" in d.get("transfers", []):
                    transfer, up = "multipart", secrets.token_hex(16)
                    n = math.ceil(size / self.chunk_size)
                    (self.s.root / "tmp" / up).mkdir()
                    parts = {str(i + 1): self.cdn + self.s.sign(f"/lfs/part/{up}/{i + 1}") for i in range(n)}
                    up = dict(href=self.base + self.s.sign(f"/lfs/complete/{up}/{oid}/{size}"), header=dict(chunk_size=str(self.chunk_size), **parts))
                else:
                    up = dict(href=self.cdn + self.s.sign(f"/lfs/put/{oid}/{size}"))
                e["actions"] = dict(upload=up, verify=verify)
            objs.append(e)
        return JSONResponse(dict(transfer=transfer, objects=objs), media_type="application/vnd.git-lfs+json")

    async def receive(self, rq, limit):
        fd, tmp = tempfile.mkstemp(dir=self.s.root / "tmp")
        h, md5, n = hashlib.sha256(), hashlib.md5(), 0
        try:
            with os.fdopen(fd, "wb") as f:
                async for c in rq.stream():
                    n += len(c)
                    if n > limit:
                        raise Fail(400, "EntityTooLarge")
                    h.update(c); md5.update(c); f.write(c)
        except BaseException:
            os.unlink(tmp)
            raise
        return tmp, h.hexdigest(), n, md5.hexdigest()

    async def lfs_data(self, rq, m, seg, raw):
        self.s.check(rq, raw)
        if self.hooks and "authorization" in rq.headers:
            raise Fail(400, "An Hub token was sent to a presigned storage url")
        match seg[1:]:
            case ["put", oid, size] if m == "PUT":
                tmp, sha, n, md5 = await self.receive(rq, int(size))
                if sha != oid or n != int(size):
                    os.unlink(tmp)
                    raise Fail(400, f"BadDigest: expected {oid} ({size} bytes), got {sha} ({n} bytes)")
                self.s.adopt(tmp, sha)
                return Response(headers={"ETag": f'"{md5}"'})
            case ["part", up, i] if m == "PUT" and (self.s.root / "tmp" / up).is_dir():
                tmp, _, _, md5 = await self.receive(rq, self.chunk_size)
                os.replace(tmp, self.s.root / "tmp" / up / i)
                return Response(headers={"ETag": f'"{md5}"'})
            case ["complete", up, oid, size] if m == "POST":
                d, dirp, h = await rq.json(), self.s.root / "tmp" / up, hashlib.sha256()
                fd, tmp = tempfile.mkstemp(dir=self.s.root / "tmp")
                with os.fdopen(fd, "wb") as out:
                    for p in sorted(d["parts"], key=lambda p: p["partNumber"]):
                        data = (dirp / str(p["partNumber"])).read_bytes()
                        if p["etag"].strip('"') != hashlib.md5(data).hexdigest():
                            raise Fail(400, f"InvalidPart {p['partNumber']}")
                        h.update(data); out.write(data)
                if h.hexdigest() != oid or os.path.getsize(tmp) != int(size) or d["oid"] != oid:
                    os.unlink(tmp)
                    raise Fail(400, "BadDigest")
                self.s.adopt(tmp, oid)
                for p in dirp.iterdir():
                    p.unlink()
                dirp.rmdir()
                return JSONResponse({})
            case ["get", oid] if m in ("GET", "HEAD") and self.s.has(oid):
                return self.send(rq, m, self.s.obj(oid), {"ETag": f'"{oid}"'})
            case ["xorb", h] if m == "GET" and (self.s.root / "xorbs" / h).exists():
                return self.send(rq, m, self.s.root / "xorbs" / h, {})
        raise Fail(404, "NoSuchKey")

    def new_discussion(self, repo, u, title, description, pr, status):
        n = len(repo["discussions"]) + 1
        ev = dict(id=secrets.token_hex(12), author=dict(name=u["name"]), createdAt=now(), type="comment", data=dict(edited=False, hidden=False,
                  latest=dict(raw=description or "", html="", updatedAt=now(), author=dict(name=u["name"])), numEdits=0, identifiedLanguage={}, editors=[]))
        repo["discussions"].append(dict(num=n, title=title, status=status if pr else "open", isPullRequest=pr, author=dict(name=u["name"]), createdAt=now(),
            repo=dict(name=repo["id"], type=repo["type"]), events=[ev], diff="", filesWithConflicts=[], changes=dict(base="refs/heads/main") if pr else None))
        if pr:
            repo["refs"][f"refs/pr/{n}"] = repo["refs"]["refs/heads/main"]
        return n

    async def commit(self, rq, t, rid, rev):
        pr = rq.query_params.get("create_pr") == "1"
        self.repo(rq, t, rid, any_user=True)                # answer 401/404 before reading the body
        lines = [json.loads(x) for x in (await rq.body()).splitlines() if x.strip()]
        if not lines or lines[0].get("key") != "header":
            raise Fail(400, "The first line must be a header")
        head = lines[0]["value"]
        async with self.s.lock:
            repo, u = self.repo(rq, t, rid, any_user=True)
            old = self.rev(repo, rev)
            if not pr and not (rev.startswith("refs/pr/") and any(d["num"] == int(rev[8:]) and d["author"]["name"] == u["name"] for d in repo["discussions"])):
                self.repo(rq, t, rid, write=True)
            ref = rev if rev in repo["refs"] else f"refs/heads/{rev}"
            if ref not in repo["refs"] and not pr:
                raise Fail(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            if (parent := head.get("parentCommit")) and not old.startswith(parent):
                raise Fail(412, "A commit has happened since. Please refresh and try again.")
            if not (head.get("summary") or "").strip():
                raise Fail(400, "Commit summary is required")
            tree = dict(repo["commits"][old]["tree"])
            for ln in lines[1:]:
                k, v = ln["key"], ln["value"]
                p = v["path"].rstrip("/")
                if p.startswith("/") or any(x in ("", ".", "..", ".git") for x in p.split("/")):
                    raise Fail(400, f"Invalid path {p}")
                if k == "file":
                    data = base64.b64decode(v["content"]) if v.get("encoding") == "base64" else v["content"].encode()
                    if len(data) > REGULAR_MAX or b"\0" in data[:8000]:
                        raise Fail(400, f"Your push was rejected because it contains binary or too large files: {p}. Use LFS/Xet for them.")
                    if p == "README.md" and (errs := card(data.decode("utf-8", "replace"))[0]):
                        raise Fail(400, "Invalid metadata in README.md: " + "; ".join(errs))
                    tree[p] = dict(sha256=self.s.put_bytes(data), size=len(data), oid=git_sha1(data), lfs=False)
                elif k == "lfsFile":
                    if not self.s.has(v["oid"]):
                        raise Fail(400, f"LFS pointer pointed to a file that does not exist: {p} {v['oid']}")
                    size = self.s.obj(v["oid"]).stat().st_size
                    if v.get("size", size) != size:
                        raise Fail(400, f"Size of {p} does not match its LFS object")
                    tree[p] = dict(sha256=v["oid"], size=size, oid=git_sha1(pointer(v["oid"], size)), lfs=True, xet=self.xet_hash(v["oid"]))
                elif k == "deletedFile":
                    if tree.pop(p, None) is None:
                        raise Fail(404, f"A file with this name doesn't exist: {p}", "EntryNotFound")
                elif k == "deletedFolder":
                    hit = [x for x in tree if x.startswith(p + "/")]
                    if not hit:
                        raise Fail(404, f"A file with this name doesn't exist: {p}/", "EntryNotFound")
                    for x in hit:
                        del tree[x]
                else:
                    raise Fail(400, f"Unknown key {k}")
            out = {}
            if pr:
                n = self.new_discussion(repo, u, head["summary"], head.get("description"), True, "open")
                ref, out = f"refs/pr/{n}", dict(pullRequestUrl=f"{self.url(repo)}/discussions/{n}")
                repo["refs"][ref] = old
            oid = self.s.commit(repo, ref, tree, head["summary"], head.get("description", ""), u["name"])
            self.s.save(repo)
        return JSONResponse(dict(success=True, commitOid=oid, commitUrl=f"{self.url(repo)}/commit/{oid}", hookOutput="", **out))

    # ---------------------------------------------------------------- download
    def resolve(self, rq, m, t, rid, rev, path):
        repo, _ = self.repo(rq, t, rid)
        oid = self.rev(repo, rev)
        f = repo["commits"][oid]["tree"].get(path)
        h = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if f is None:
            raise Fail(404, "Entry not found", "EntryNotFound", h)
        if f["lfs"]:      # as on the Hub: metadata on the redirect itself, bytes on another origin that gets no token
            h |= {"X-Linked-Size": str(f["size"]), "X-Linked-Etag": f'"{f["sha256"]}"',
                  "Location": self.cdn + self.s.sign(f"/lfs/get/{f['sha256']}")}
            if f.get("xet"):
                h |= {"X-Xet-Hash": f["xet"], "Link": f'<{self.base}/api/{t}s/{rid}/xet-read-token/{oid}>; rel="xet-auth"'}
            return Response("Found. Redirecting", 302, headers=h)
        h |= {"ETag": f'"{f["oid"]}"', "Content-Disposition": f'inline; filename="{quote(path.rsplit("/", 1)[-1])}";'}
        return self.send(rq, m, self.s.obj(f["sha256"]), h)

    def send(self, rq, m, path, h):
        size, status = path.stat().st_size, 200
        start, end = 0, size - 1
        if (r := rq.headers.get("range")) and (mt := re.fullmatch(r"bytes=(\d*)-(\d*)", r.strip())) and mt.group(0) != "bytes=-":
            a, b = mt.groups()
            start, end = (int(a), min(int(b), size - 1) if b else size - 1) if a else (max(0, size - int(b)), size - 1)
            if start >= size or start > end:
                raise Fail(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, h = 206, {**h, "Content-Range": f"bytes {start}-{end}/{size}"}
        n = end - start + 1
        h = {**h, "Content-Length": str(n), "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if m == "HEAD":
            return Response(status_code=status, headers=h)
        cut = None
        for fault in self.faults:
            if "drop_after" in fault and fault.get("times", 1) > 0 and path.name.startswith(fault.get("sha256", "")):
                fault["times"] = fault.get("times", 1) - 1
                cut = fault["drop_after"]
                break

        async def body():
            left = n
            with open(path, "rb") as fh:
                fh.seek(start)
                while left:
                    c = fh.read(min(CHUNK, left))
                    left -= len(c)
                    yield c
                    if cut is not None and n - left >= cut:
                        raise ConnectionAbortedError("test hook: connection dropped")   # uvicorn closes the socket mid-body
        return StreamingResponse(body(), status, headers=h)


async def cut_answer(rq, bytes_read):
    """read so much of a request, begin to answer, hang up"""
    n = 0
    async for c in rq.stream():
        n += len(c)
        if n >= bytes_read:
            break
    yield b"{"
    raise ConnectionAbortedError("test hook: connection dropped")


def card(text):
    """errors, warnings, metadata of a README.md"""
    mt = re.match(r"^\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
    if not mt:
        return [], ["empty or missing yaml metadata in repo card"], {}
    try:
        meta = yaml.safe_load(mt.group(1)) or {}
    except yaml.YAMLError as e:
        return [f"Invalid YAML: {e}"], [], {}
    if not isinstance(meta, dict):
        return ["metadata must be a mapping"], [], {}
    errors = [f'"{k}" must be a string' for k in ("library_name", "pipeline_tag") if k in meta and not isinstance(meta[k], str)]
    errors += [f'"{k}" must be an array of strings' for k in ("tags", "datasets") if k in meta and not (
        isinstance(meta[k], str) or isinstance(meta[k], list) and all(isinstance(x, str) for x in meta[k]))]
    return errors, [], json.loads(json.dumps(meta, default=str))


def make_app(hub):
    return Starlette(routes=[Route("/{p:path}", hub.__call__, methods=["GET", "HEAD", "POST", "PUT", "DELETE"])])


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--root", required=True)
    ap.add_argument("--host", default="127.0.0.1")
    ap.add_argument("--port", type=int, default=8765)
    ap.add_argument("--token", action="append", default=[], help="TOKEN=USER[:write|read[:org,org]]")
    ap.add_argument("--multipart-over", type=int, default=5 * 1024**3)
    ap.add_argument("--chunk-size", type=int, default=64 * 1024**2)
    ap.add_argument("--xet", action="store_true", help="also serve the Xet upload/download protocol (needs lz4)")
    ap.add_argument("--test-hooks", action="store_true")
    a = ap.parse_args()
    tokens = {}
    for x in a.token:
        tok, who = x.split("=", 1)
        name, role, orgs = (who.split(":") + ["", ""])[:3]
        tokens[tok] = dict(name=name, role=role or "write", orgs=[o for o in orgs.split(",") if o])
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((a.host, a.port))
    sock.listen(128)                    # a client may connect as soon as it reads READY
    port = sock.getsockname()[1]
    hub = Hub(Store(a.root), tokens, f"http://{a.host}:{port}", f"http://localhost:{port}", a.multipart_over, a.chunk_size, a.test_hooks, a.xet)
    print(f"READY http://{a.host}:{port}", flush=True)
    uvicorn.Server(uvicorn.Config(make_app(hub), log_level="critical" if a.test_hooks else "warning", lifespan="off")).run(sockets=[sock])


if __name__ == "__main__":
    main()
