"""A local stand-in of the Hugging Face hub, with the requests of its own client.

It creates repositories, takes commits (small files in the commit, safetensors by the
protocol of Git LFS), and serves the files of the last commit.
"""

import base64
import hashlib
from http import server
import json
import re
import threading

TOKEN = 'hf_test'
USER = 'user'  # The only one that the token may write to.


class Hub(server.ThreadingHTTPServer):
    """The server; `files` are {repository: {path: content}}, `private` a set."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.objects, self.private, self.messages = {}, {}, set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'

    def commit(self, repository):
        """Identifier of the last commit."""
        content = sorted((p, c.hex()) for p, c in self.files[repository].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class Handler(server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def _reply(self, content=b'', status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers['Content-Type'] = 'application/json'
        self.send_response(status)
        for name, value in {'Content-Length': len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def _body(self):
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def do_PUT(self):
        self.server.objects[self.path.rpartition('/')[2]] = self._body()
        self._reply()

    def do_POST(self):
        body, hub = self._body(), self.server
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self._reply({'error': 'Invalid username or password.'}, 401)
        if self.path == '/api/validate-yaml':
            content = json.loads(body)['content']
            assert content.startswith('---\n')
            return self._reply({'errors': [], 'warnings': []})
        if self.path == '/api/repos/create':
            return self._create(json.loads(body))
        if re.fullmatch(r'/api/models/(.*)/preupload/main', self.path):
            paths = [file['path'] for file in json.loads(body)['files']]
            mode = lambda path: 'lfs' if path.endswith('.safetensors') else 'regular'
            files = [{'path': p, 'uploadMode': mode(p)} for p in paths]
            files = [file | {'shouldIgnore': False} for file in files]
            return self._reply({'files': files})
        if re.fullmatch(r'/(.*)\.git/info/lfs/objects/batch', self.path):
            objects = [
                o | {'actions': {'upload': {'href': f'{hub.url}/objects/{o["oid"]}'}}}
                for o in json.loads(body)['objects']
            ]
            return self._reply({'transfer': 'basic', 'objects': objects})
        found = re.fullmatch(r'/api/models/(.*)/commit/main', self.path)
        self._commit(found[1], [json.loads(line) for line in body.splitlines()])

    def _create(self, asked):
        hub, repository = self.server, f'{asked["organization"]}/{asked["name"]}'
        if asked['organization'] != USER:
            return self._reply({'error': 'You have no rights to create it.'}, 403)
        address = {'url': f'{hub.url}/{repository}'}
        if repository in hub.files:
            return self._reply(address, 409)
        hub.files[repository] = {}
        if 'private' in (asked.get('visibility'), asked.get('private') and 'private'):
            hub.private.add(repository)
        self._reply(address)

    def _commit(self, repository, lines):
        files = self.server.files[repository]
        for line in lines:
            value = line['value']
            if line['key'] == 'header':
                self.server.messages.append(value['summary'])
            elif line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            else:
                content = self.server.objects[value['oid']]
                assert hashlib.sha256(content).hexdigest() == value['oid']
                files[value['path']] = content
        commit = self.server.commit(repository)
        url = f'{self.server.url}/{repository}/commit/{commit}'
        self._reply({'commitUrl': url, 'commitOid': commit})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.partition('?')[0]
        found = re.fullmatch(r'/api/models/(\w+/[\w-]+)(/.*)?', path)
        file = re.fullmatch(r'/(\w+/[\w-]+)/resolve/\w+/(.+)', path)
        if not (found or file):
            return self._reply({'error': 'Not found'}, 404)
        repository = (found or file)[1]
        if repository not in hub.files:
            return self._reply(
                {'error': 'Not found'}, 404, **{'X-Error-Code': 'RepoNotFound'}
            )
        files, commit = hub.files[repository], hub.commit(repository)
        if file:
            if file[2] not in files:
                return self._reply(b'', 404, **{'X-Error-Code': 'EntryNotFound'})
            content = files[file[2]]
            etag = hashlib.sha256(content).hexdigest()
            headers = {'X-Repo-Commit': commit, 'ETag': f'"{etag}"'}
            return self._reply(content, **headers)
        if (found[2] or '').startswith('/tree/'):
            tree = [
                {'type': 'file', 'path': p, 'size': len(c), 'oid': f'{len(c):040x}'}
                for p, c in files.items()
            ]
            return self._reply(tree)
        self._reply(
            {
                'id': repository,
                'sha': commit,
                'private': repository in hub.private,
                'siblings': [{'rfilename': name} for name in files],
            }
        )
