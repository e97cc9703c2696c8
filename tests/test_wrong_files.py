"""Wrong files, as people write them, and every line that they are told: place, key, what is there, what may be."""

# ruff: noqa: E501 - the lines stand here as they are told

from __future__ import annotations

import pytest

from trioswap.config.llamaswap import translate
from trioswap.config.loading import load_sources
from trioswap.errors import ConfigError

# The only variable that is set.
ENVIRON = {"HOME": "/home/x"}

# Files, each behind a line with what is wrong, and with `>>` before the lines that are told.
IN_YAML = r"""
#### unknown keys
healthchecktimeout: 60
memory: {headrom: 1GiB}
models:
  a:
    cmd: serve ${PORT}
    checkEndpoit: /up
>> 1: healthchecktimeout: unknown key, did you mean "healthCheckTimeout"? (with --lenient it would be left out)
>> 2: memory.headrom: unknown key, did you mean "headroom"? (with --lenient it would be left out)
>> 6: models.a.checkEndpoit: unknown key, did you mean "checkEndpoint"? (with --lenient it would be left out)
#### wrong types
startPort: many
sendLoadingState: 3
models:
  a:
    cmd: {run: serve}
    ttl: soon
    aliases: b
    unlisted: maybe
>> 1: startPort: found "many", allowed is a whole number
>> 2: sendLoadingState: found 3, allowed is true or false
>> 5: models.a.cmd: found a table, allowed is text or an array of texts
>> 6: models.a.ttl: found "soon", allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 7: models.a.aliases: found "b", allowed is an array of texts
>> 8: models.a.unlisted: found "maybe", allowed is true or false
#### empty cmd
models:
  a:
    cmd: ""
  b:
    proxy: http://127.0.0.1:9001
  c:
    cmd: |
      # only a comment
    proxy: http://127.0.0.1:9002
>> 3: models.a.cmd: found an empty command, allowed is a program with its arguments
>> 4: models.b.cmd: found neither cmd nor gguf, allowed is one of them
>> 7: models.c.cmd: found an empty command, allowed is a program with its arguments
#### unterminated quote
models:
  a:
    cmd: |
      serve --port ${PORT}
      --name "half of it
>> 3: models.a.cmd: found " at line 2, column 8 of the command, allowed are quotes in pairs
#### unknown macro
macros:
  server: serve --port ${PORT}
models:
  a:
    cmd: ${servr} -m x
>> 5: models.a.cmd: found ${servr}, allowed is one of ${MODEL_ID}, ${PORT}, ${server}, did you mean "server"?
#### forward macro
macros:
  line: ${server} --quiet
  server: serve --port ${PORT}
models:
  a:
    cmd: ${line} ${PORT}
>> 2: macros.line: found ${server}, which is defined after it, allowed are macros defined before
#### reserved macro
macros:
  PORT: 5000
models:
  a:
    macros:
      MODEL_ID: b
    cmd: serve ${PORT}
>> 2: macros.PORT: found the name PORT, which trioswap gives a meaning to, allowed is any other name
>> 6: models.a.macros.MODEL_ID: found the name MODEL_ID, which trioswap gives a meaning to, allowed is any other name
#### env not set
apiKeys: ["${env.TRIOSWAP_KEY}"]
models:
  a:
    cmd: serve ${PORT} # ${env.ALSO}
    env: ["A=${env.TRIO_HOME}"]
>> 1: apiKeys[0]: found ${env.TRIOSWAP_KEY}, but no such variable is set, allowed are variables of the environment
>> 5: models.a.env[0]: found ${env.TRIO_HOME}, but no such variable is set, allowed are variables of the environment, did you mean "HOME"?
#### alias equal to a model
models:
  a:
    cmd: serve ${PORT}
    aliases: [b]
  b:
    cmd: serve ${PORT}
    aliases: [x, y]
  c:
    cmd: serve ${PORT}
    aliases:
    - z
    - y
>> 4: models.a.aliases[0]: found "b", which is the name of a model, allowed is a name of its own
>> 12: models.c.aliases[1]: found "y", which is an alias of "b" already, allowed is a name of its own
#### group members
models:
  llama: {cmd: serve ${PORT}}
  b: {cmd: serve ${PORT}}
groups:
  one:
    members: [llama, lama, b]
  two:
    members:
    - b
>> 6: groups.one.members[1]: found "lama", allowed is the name of a model, did you mean "llama"?
>> 9: groups.two.members[0]: found "b", which is in group "one" already, allowed is one group, once
#### a member twice, under routing
models:
  a: {cmd: serve ${PORT}}
routing:
  router:
    settings:
      groups:
        g:
          members: [a, a]
>> 8: routing.router.settings.groups.g.members[1]: found "a", which is in this group already, allowed is one group, once
#### syntax of the matrix
models:
  a: {cmd: serve ${PORT}}
  b: {cmd: serve ${PORT}}
matrix:
  vars:
    q: quen
  evict_costs:
    a: 0
    nobody: 3
  sets:
    one: a & & b
    two: (a | b
    three: a $ b
    four: a & c
    five: + one
    six: ""
    seven: a b
>> 6: matrix.vars.q: found "quen", allowed is the name of a model
>> 8: matrix.evict_costs.a: found 0, allowed is a whole number from 1 up
>> 9: matrix.evict_costs.nobody: found "nobody", allowed is the name of a var or of a model
>> 11: matrix.sets.one: found "&" at column 5, allowed is a var, a model, "+" with the name of a set, or "("
>> 12: matrix.sets.two: found "(" at column 1 without its ")", allowed are parentheses in pairs
>> 13: matrix.sets.three: found "$" at column 3, allowed are letters, digits, "_", "-" and "." in names (other models need a var), "&", "|", "+", "(" and ")"
>> 14: matrix.sets.four: found "c" at column 5, allowed is the name of a var or of a model
>> 15: matrix.sets.five: found "+" at column 1, allowed is "+" with the name of a set right behind it
>> 16: matrix.sets.six: found "", allowed is an expression, such as "a & (b | c)"
>> 17: matrix.sets.seven: found "b" at column 3, allowed is "&", "|" or the end
#### sets in a circle
models:
  a: {cmd: serve ${PORT}}
routing:
  router:
    use: matrix
    settings:
      matrix:
        sets:
          one: a | +two
          two: +three
          three: a & +one
          four: +five
>> 11: routing.router.settings.matrix.sets.three: found "+one" at column 5, which leads back here (three -> one -> two -> three), allowed are references that come to an end
>> 12: routing.router.settings.matrix.sets.four: found "+five" at column 1, allowed is "+" with the name of a set
#### negative numbers
globalTTL: -1
models:
  a:
    cmd: serve ${PORT}
    ttl: -2
    unloadTimeout: -3
    capabilities: {context: -1}
>> 1: globalTTL: found -1, allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 5: models.a.ttl: found -2, allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 6: models.a.unloadTimeout: found -3, allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 7: models.a.capabilities.context: found -1, allowed is a whole number from 0 up
#### bad regex
upstream:
  ignorePaths:
  - \.css$
  - (unclosed
>> 4: upstream.ignorePaths[1]: found "(unclosed", allowed is a regular expression of Python's re of at most 500 characters (missing ), unterminated subpattern at position 0)
#### ports out of range
startPort: 0
listen: 127.0.0.1:70000
models:
  a:
    cmd: serve
    proxy: http://127.0.0.1:65536
>> 1: startPort: found 0, allowed is 1 to 65535
>> 2: listen: found port 70000 in "127.0.0.1:70000", allowed is 0 to 65535
>> 6: models.a.proxy: found port 65536 in "http://127.0.0.1:65536", allowed is 1 to 65535
#### port clash
models:
  a: {cmd: serve, proxy: "http://localhost:9000"}
  b: {cmd: serve, proxy: "http://127.0.0.1:9000"}
groups:
  g: {swap: false, members: [a, b]}
>> 3: models.b.proxy: found "http://127.0.0.1:9000", which is the address of model "a" too, allowed is that only for models of which groups never let two be resident together
#### own port
listen: 0.0.0.0:9000
models:
  a:
    cmd: serve
    proxy: http://localhost:9000
>> 5: models.a.proxy: found "http://localhost:9000", which is where trioswap listens, allowed is another address
#### no port
models:
  a:
    cmd: serve --port 9000
  b:
    cmd: serve --port 9000
    proxy: http://127.0.0.1:${PORT}
>> 2: models.a.proxy: found neither proxy nor ${PORT} in cmd, allowed is one of them or both
>> 6: models.b.proxy: found ${PORT}, allowed is that only when cmd uses ${PORT} too
#### preload of models that exclude each other
models:
  a: {cmd: serve ${PORT}}
  b: {cmd: serve ${PORT}, aliases: [bb]}
hooks:
  on_startup:
    preload: [a, bb]
>> 6: hooks.on_startup.preload: found models of which groups never let "a" and "b" be resident together, allowed are models that can be
#### preload of nobody
models:
  model-a: {cmd: serve ${PORT}}
hooks:
  on_startup:
    preload: [model-b]
>> 5: hooks.on_startup.preload[0]: found "model-b", allowed is the name of a model or an alias, did you mean "model-a"?
#### profiles
models:
  qwen: {cmd: serve ${PORT}}
profiles:
  night:
    pins:
      big: qwn
      small: qwen
  empty:
    pins: {}
  none:
    description: x
>> 6: profiles.night.pins.big: found "qwn", allowed is the name of a model, an alias, a selector or the name of a peer's model, or an empty text, did you mean "qwen"?
>> 9: profiles.empty.pins: found no pin, allowed is at least one
>> 10: profiles.none.pins: found no pin, allowed is at least one
#### old profiles
models:
  a: {cmd: serve ${PORT}}
profiles:
  both:
  - a
>> 4: profiles.both: found a list, as older versions had it, allowed is a mapping with pins, of names to targets
#### selectors
models:
  a: {cmd: serve ${PORT}}
  b: {cmd: serve ${PORT}}
selectors:
  one:
    strategy: warm
    targets: []
  two:
    strategy: spil
    targets: [a]
  three:
    strategy: spillover
    targets: [a, b]
    settings: {spillover: 0}
  b:
    strategy: pin
    targets: [one]
>> 7: selectors.one.targets: found none, allowed is at least one
>> 9: selectors.two.strategy: found "spil", allowed is one of pin, warm, spillover, did you mean "spillover"?
>> 13: selectors.three.targets: found targets of which groups never let "a" and "b" be resident together, allowed with spillover are targets that can be
>> 14: selectors.three.settings.spillover: found 0, allowed is a whole number from 1 up
>> 15: selectors.b: found "b", which is the name of a model, allowed is a name of its own
>> 17: selectors.b.targets[0]: found "one", which is a selector itself, allowed is the name of a model, an alias, or the name of a peer's model
#### peers
models:
  far/qwen: {cmd: serve ${PORT}}
peers:
  far:
    proxy: http://198.51.100.7
    models: [qwen]
  near:
    proxy: ftp://198.51.100.7
    models: []
  nowhere:
    models: [x]
  keyed:
    proxy: https://198.51.100.7
    apiKey: two words
    models: [x]
>> 2: models."far/qwen": found "far/qwen", which a model of peer "far" is called, allowed is a name of its own
>> 8: peers.near.proxy: found "ftp://198.51.100.7", allowed is http[s]://HOST[:PORT][/PATH]
>> 9: peers.near.models: found none, allowed is at least one
>> 10: peers.nowhere.proxy: found none, allowed is the address of the peer
>> 14: peers.keyed.apiKey: found a key with spaces or control characters, allowed is one without
#### keys twice
models:
  a:
    cmd: serve ${PORT}
    ttl: 5
    ttl: 6
  b: {cmd: serve ${PORT}}
  b: {cmd: other ${PORT}}
>> 4: models.a.ttl: found it again on line 5, allowed is once
>> 6: models.b: found it again on line 7, allowed is once
#### yaml syntax colon
models:
  a:
    cmd: serve --title Large: one
>> 3: found ":" where no key can end, allowed is one `key: value` on a line, with text that holds ": " in quotes (column 29: mapping values are not allowed in this context)
#### yaml syntax bracket
apiKeys: [one, two
models:
  a: x
>> 2: found neither a comma nor the closing bracket of a list or mapping in brackets, allowed is one of them (column 7: while parsing a flow sequence, did not find expected ',' or ']')
#### yaml syntax indent
models:
  a:
    cmd: x
   ttl: 5
>> 4: found what fits neither the line before nor, by its indentation, those above, allowed are `key: value` or `- item`, indented like their neighbours (column 4: while parsing a block mapping, did not find expected key)
#### a list at the top
# models
- a
- b
>> 2: found a list at the top of the file, allowed are keys with values (key: value)
#### two documents
logLevel: info
---
logLevel: debug
>> 2: found a second document (---), allowed is one in a file
#### groups and matrix
models:
  a: {cmd: serve ${PORT}}
groups:
  g: {members: [a]}
matrix:
  sets: {s: a}
>> 5: matrix: found matrix beside groups, allowed is one of them
#### groups in both places
models:
  a: {cmd: serve ${PORT}}
groups:
  g: {members: [a]}
routing:
  router:
    use: group
    settings:
      groups:
        g: {members: [a]}
>> 3: groups: found groups beside routing.router, allowed is one of them, and routing.router.settings.groups is its place there
#### routing.use
routing:
  router:
    use: matrx
  scheduler:
    use: lifo
    settings:
      fifo:
        priority:
          nobody: 3
  rooter: {}
>> 3: routing.router.use: found "matrx", allowed is one of group, matrix, did you mean "matrix"?
>> 5: routing.scheduler.use: found "lifo", allowed is one of fifo, did you mean "fifo"?
>> 9: routing.scheduler.settings.fifo.priority.nobody: found "nobody", allowed is the name of a model or an alias
>> 10: routing.rooter: unknown key, did you mean "router"? (with --lenient it would be left out)
#### env list
models:
  a:
    cmd: serve ${PORT}
    env:
    - HOME
    - 1A=x
    - B=y
>> 5: models.a.env[0]: found "HOME", allowed is a text NAME=VALUE
>> 6: models.a.env[1]: found the name "1A", allowed are letters, digits and _, no digit first
#### set params
models:
  a:
    cmd: serve ${PORT}
    filters:
      setParams: [temperature]
      setParamsByID:
        b: {seed: 1}
  b:
    cmd: serve ${PORT}
>> 5: models.a.filters.setParams: found an array, allowed is a table
>> 7: models.a.filters.setParamsByID.b: found "b", which is the name of a model, allowed is a name of its own
#### modality
models:
  a:
    cmd: serve ${PORT}
    capabilities:
      in: [text, sight]
      contxt: 5
>> 5: models.a.capabilities.in[1]: found "sight", allowed is one of text, audio, image
>> 6: models.a.capabilities.contxt: unknown key, did you mean "context"? (with --lenient it would be left out)
#### endpoint
models:
  a:
    cmd: serve ${PORT}
    checkEndpoint: health
logTimeFormat: rfc3393
logToStdout: all
>> 4: models.a.checkEndpoint: found "health", allowed is a path such as "/health", or "none"
>> 5: logTimeFormat: found "rfc3393", allowed is one of ansic, unixdate, rubydate, rfc822, rfc822z, rfc850, rfc1123, rfc1123z, rfc3339, rfc3339nano, kitchen, stamp, stampmilli, stampmicro, stampnano, did you mean "rfc3339"?
>> 6: logToStdout: found "all", allowed is one of proxy, upstream, both, none
#### a list as a key
models:
  [a, b]: {cmd: x}
>> 2: found a list as a key, allowed is text
#### unknown anchor
models:
  a: *base
>> 2: found the alias *base, allowed is the name of an anchor (&base) that is complete before it
#### bad tag
startPort: !!int many
>> 1: found "many" under the tag !!int, allowed is what it names
#### secret
apiKeys:
- {key: hidden}
- "two words"
>> 2: apiKeys[0]: found something else (not shown, it may be a secret), allowed is text in quotes
>> 3: apiKeys[1]: found a key with spaces or control characters, allowed are keys without
#### keys and who may ask
apiKeys: [one]
trustedProxies:
- 10.0.0.0/8
- 10.1.0.0/8
queueTimeout: soon
keys:
  bob: my-secret
  eve:
    key: one
    models: [quen]
    endpoints:
    - v1/models
  joe: {hash: my-secret, admin: true, readOnly: true}
cors:
  origins: [https://chat.example/, "*"]
tls: {certFile: a.crt}
models:
  qwen: {cmd: serve ${PORT}}
>> 4: trustedProxies[1]: found "10.1.0.0/8", which is an address within a network, allowed is an address or a network, such as "10.0.0.5" or "10.0.0.0/8", did you mean "10.0.0.0/8"?
>> 5: queueTimeout: found "soon", allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 7: keys.bob: found something else (not shown, it may be a secret), allowed is a table
>> 9: keys.eve.key: found the key that is one of api_keys already, allowed is one of its own
>> 10: keys.eve.models[0]: found "quen", allowed is the name of a model, an alias, a selector, a pin or a peer's model, or a pattern of such names, did you mean "qwen"?
>> 12: keys.eve.endpoints[0]: found "v1/models", allowed is a path such as "/v1/embeddings" or "/v1/audio/*", without ? and #
>> 13: keys.joe.hash: found something else (not shown, it may be a secret), allowed is "sha256:" and 64 hexadecimal digits, as `trioswap key new` makes it
>> 13: keys.joe.readOnly: found read_only beside admin, allowed is one of them
>> 15: cors.origins[0]: found "https://chat.example/", allowed is SCHEME://HOST[:PORT] without a path, such as "https://chat.example", or "*" alone, did you mean "https://chat.example"?
>> 15: cors.origins[1]: found "*" beside other origins, allowed is SCHEME://HOST[:PORT] without a path, such as "https://chat.example", or "*" alone
>> 16: tls.keyFile: found none, allowed is the path of a PEM file
"""

IN_TOML = r"""
#### unknown keys
lisen = "127.0.0.1:8080"
memory.colour = "red"

[models.a]
cmd = "serve ${PORT}"
checkEndpoint = "/up"
>> 1: lisen: unknown key, did you mean "listen"?
>> 2: memory.colour: unknown key, allowed are headroom, yield_to_others, learn, devices
>> 6: models.a.checkEndpoint: unknown key, did you mean "check_endpoint"?
#### wrong types
start_port = "5800"
api_keys = "k"

[models.a]
cmd = 5
unlisted = "yes"
aliases = "b"
ttl = true
>> 1: start_port: found "5800", allowed is a whole number
>> 2: api_keys: found something else (not shown, it may be a secret), allowed is an array of texts
>> 5: models.a.cmd: found 5, allowed is text or an array of texts
>> 6: models.a.unlisted: found "yes", allowed is true or false
>> 7: models.a.aliases: found "b", allowed is an array of texts
>> 8: models.a.ttl: found true, allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
#### empty cmd
[models.a]
cmd = ""

[models.b]
cmd = []

[models.c]
ttl = 5
>> 2: models.a.cmd: found an empty command, allowed is a program with its arguments
>> 5: models.b.cmd: found an empty command, allowed is a program with its arguments
>> 7: models.c.cmd: found neither cmd nor gguf, allowed is one of them
#### unterminated
[models.a]
cmd = '''
serve --port ${PORT}
--name 'half
'''
>> 2: models.a.cmd: found ' at line 2, column 8 of the command, allowed are quotes in pairs
#### unknown macro
macros.ctx = 4096

[models.a]
cmd = "serve --port ${PORT} --ctx ${ctxt}"
description = "a ${nope}"
>> 4: models.a.cmd: found ${ctxt}, allowed is one of ${MODEL_ID}, ${PORT}, ${ctx}, did you mean "ctx"?
>> 5: models.a.description: found ${nope}, allowed is one of ${MODEL_ID}, ${PORT}, ${ctx}
#### forward
[macros]
one = "${two}"
two = "x"

[models.a]
cmd = "serve ${PORT} ${one}"
>> 2: macros.one: found ${two}, which is defined after it, allowed are macros defined before
#### env
state_dir = "${env.STATE}"

[models.a]
cmd = "serve ${PORT}"
env = { A = "${env.9}" }
>> 1: state_dir: found ${env.STATE}, but no such variable is set, allowed are variables of the environment
>> 5: models.a.env.A: found ${env.9}, allowed are names of letters, digits and _ that do not begin with a digit
#### members
[models.a]
cmd = "serve ${PORT}"

[groups.g]
members = ["a", "A"]

[groups.h]
members = [
  "b",
  "a",
]
>> 5: groups.g.members[1]: found "A", allowed is the name of a model, did you mean "a"?
>> 9: groups.h.members[0]: found "b", allowed is the name of a model
>> 10: groups.h.members[1]: found "a", which is in group "g" already, allowed is one group, once
#### matrix
[models.a]
cmd = "serve ${PORT}"

[matrix]
vars = { "x y" = "a" }

[matrix.sets]
s = "a &"
t = "a | +u"
u = "a)"
>> 5: matrix.vars."x y": found "x y", allowed is a name of 1 to 32 letters A to Z, a to z, digits, "." and "-"
>> 8: matrix.sets.s: found the end of the expression, allowed is a var, a model, "+" with the name of a set, or "("
>> 10: matrix.sets.u: found ")" at column 2 without its "(", allowed are parentheses in pairs
#### circle
[models.a]
cmd = "serve ${PORT}"

[matrix.sets]
s = "+s"
>> 5: matrix.sets.s: found "+s" at column 1, which leads back here (s -> s), allowed are references that come to an end
#### durations sizes
max_wait = "10 minutes"
max_request_body = 0
capture_buffer = "10 megs"
health_check_timeout = 0

[models.a]
cmd = "serve ${PORT}"
ttl = -1
weight = 0
parallel = 0
memory = "4G"
>> 1: max_wait: found "10 minutes", allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 2: max_request_body: found 0, allowed is a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB", but not 0
>> 3: capture_buffer: found "10 megs", allowed is a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB"
>> 4: health_check_timeout: found 0, allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d", but not 0
>> 8: models.a.ttl: found -1, allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"
>> 9: models.a.weight: found 0, allowed is a number from 0 up, but not 0
>> 10: models.a.parallel: found 0, allowed is a whole number from 1 up
>> 11: models.a.memory: found "4G", allowed is a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB"
#### memory
[memory]
headroom = "1GiB"
devices = { gpu0 = "8GiB", ram = "auto" }

[models.a]
cmd = "serve ${PORT}"
memory = "7.5GiB"

[models.b]
cmd = "serve ${PORT}"
memory = { gpu1 = "1GiB" }

[models.c]
cmd = "serve ${PORT}"
device = "gpu00"
memory = "1GiB"
>> 7: models.a.memory: found 7.5GiB, allowed is at most 7GiB, which is gpu0 without the headroom
>> 11: models.b.memory.gpu1: found "gpu1", allowed is one of gpu0, ram, did you mean "gpu0"?
>> 15: models.c.device: found "gpu00", allowed is one of auto, gpu0, ram, did you mean "gpu0"?
#### spill
[models]
a = { cmd = "serve ${PORT}" }
b = { cmd = "serve ${PORT}" }
c = { cmd = "serve ${PORT}" }

[matrix]
sets = { s = "a & b", t = "c" }

[selectors.s]
strategy = "spillover"
targets = ["a", "c"]
>> 11: selectors.s.targets: found targets that no set of the matrix has together ("a", "c"), allowed with spillover are targets that can be
#### warm peer
[peers.far]
proxy = "https://198.51.100.7"
models = ["m"]

[selectors.s]
strategy = "warm"
targets = ["m", "far/m"]

[selectors."far/m"]
strategy = "pin"
targets = ["m"]

[profiles.p]
pins = { "far/m" = "" }
>> 7: selectors.s.targets[0]: found "m", which is at a peer, allowed are models of our own with warm
>> 7: selectors.s.targets[1]: found "far/m", which "m" before it stands for already, allowed is each target once
>> 9: selectors."far/m": found "far/m", which a model of peer "far" is called, allowed is a name of its own
>> 14: profiles.p.pins."far/m": found "far/m", which a model of peer "far" is called, allowed is a name of its own
#### choices
policy = "fiffo"
log_level = "warn"

[models.a]
cmd = "serve ${PORT}"
stop_signal = "SIGSTOP"
port_owner = "me"
>> 1: policy: found "fiffo", allowed is one of lease, fifo, did you mean "fifo"?
>> 2: log_level: found "warn", allowed is one of debug, info, warning, error, did you mean "warning"?
>> 6: models.a.stop_signal: found "SIGSTOP", allowed is one of SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2, SIGKILL, did you mean "SIGINT"?
>> 7: models.a.port_owner: found "me", allowed is one of child, any
#### syntax
[models.a]
cmd = serve
>> 2: Invalid value
#### groups and matrix
[models.a]
cmd = "serve ${PORT}"

[groups.g]
members = ["a"]

[matrix]
sets.s = "a"
>> 7: matrix: found matrix beside groups, allowed is one of them
#### matrix no sets
[matrix]
vars = {}
>> 1: matrix.sets: found no set, allowed is at least one
#### date
start_port = 2024-05-01
metrics_max_in_memory = 1.5

[models.a]
cmd = ["serve", 8080, "${PORT}"]
metadata = { when = 2024-05-01T10:00:00Z, ratio = inf }
>> 1: start_port: found a date or time, allowed is a whole number
>> 2: metrics_max_in_memory: found 1.5, allowed is a whole number from 1 up
>> 5: models.a.cmd[1]: found 8080, allowed is text in quotes, did you mean "8080"?
>> 6: models.a.metadata.when: found a date or time, allowed is what JSON can say: text, a finite number, true or false, an array or a table
>> 6: models.a.metadata.ratio: found inf, allowed is what JSON can say: text, a finite number, true or false, an array or a table
#### set params
[models.a]
cmd = "serve ${PORT}"

[models.a.filters]
strip_params = "top_p"
set_params = { model = "x" }
set_params_by_id = { "${nope}" = {} }
>> 5: models.a.filters.strip_params: found "top_p", allowed is an array of texts
>> 7: models.a.filters.set_params_by_id."${nope}": found ${nope}, allowed is one of ${MODEL_ID}, ${PORT}
"""


def file_in(case: str):
    """The file of one case, with its lines."""
    name, *rest = case.splitlines()
    text = "".join(f"{line}\n" for line in rest if not line.startswith(">> "))
    told = [line.removeprefix(">> ") for line in rest if line.startswith(">> ")]
    return pytest.param(text, told, id=name)


def files_in(cases: str) -> list:
    """The files in *cases*."""
    return [file_in(case) for case in cases.split("#### ")[1:]]


@pytest.fixture
def told(tmp_path):
    """Writes files, by name, and gives the lines that reading them ends in, without the directory."""

    def told(**files: str | bytes) -> list[str]:
        paths = []
        for name, content in files.items():
            path = tmp_path / name.replace("_", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(path)
        with pytest.raises(ConfigError) as caught:
            load_sources(paths, None, ENVIRON, translate)
        return [line.replace(f"{tmp_path}/", "") for line in caught.value.mistakes]

    return told


@pytest.mark.parametrize(("text", "lines"), files_in(IN_YAML))
def test_a_wrong_file_of_llama_swap(told, text, lines):
    """Everything that is wrong with it is told at once, in the spelling of the file."""
    assert told(wrong_yaml=text) == [f"wrong.yaml:{line}" for line in lines]


@pytest.mark.parametrize(("text", "lines"), files_in(IN_TOML))
def test_a_wrong_file_of_our_own(told, text, lines):
    """The same in TOML."""
    assert told(wrong_toml=text) == [f"wrong.toml:{line}" for line in lines]


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        ({"wrong_yaml": b"models:\n  a: {cmd: \xff}\n"}, ["wrong.yaml:2: found byte 0xff, allowed is UTF-8"]),
        (
            {"wrong_toml": b"log_level = 'info'\npolicy = '\xe9'\n"},
            ["wrong.toml:2: found byte 0xe9, allowed is UTF-8"],
        ),
        (
            {"wrong_yaml": b"log\x01Level: info"},
            ["wrong.yaml:1: found the character U+0001, allowed are printable ones"],
        ),
        (
            {"wrong_yaml": b"models:\n\ta:\n"},
            [
                "wrong.yaml:2: found a tab, allowed are spaces to indent with (column 1: while scanning for the next token, found character that cannot start any token)"
            ],
        ),
    ],
    ids=["YAML in Latin-1", "TOML in Latin-1", "control characters", "tabs"],
)
def test_characters_that_no_file_has(told, files, lines):
    """The line and the character, so that an editor finds it."""
    assert told(**files) == lines


@pytest.mark.parametrize("mixed", [("yaml", "yaml"), ("toml", "toml"), ("yaml", "toml")], ids="-".join)
def test_files_that_contradict_each_other(told, mixed):
    """Both places are named, also where two languages meet."""
    texts = {
        "yaml": "listen: 127.0.0.1:{port}\nmodels:\n  a: {{cmd: 'serve ${{PORT}}'}}\n",
        "toml": 'listen = "127.0.0.1:{port}"\n[models]\na = {{ cmd = "serve ${{PORT}}" }}\n',
    }
    one, other = (texts[language].format(port=port) for port, language in enumerate(mixed, start=8001))
    first, second = f"wrong.{mixed[0]}", f"more.{mixed[1]}"

    assert told(**{first.replace(".", "_"): one, second.replace(".", "_"): other}) == [
        f"{first}:1: listen: found another value at {second}:1, allowed is the same in all files",
        f"{first}:3: models.a: found it again at {second}:3, allowed is one file for each",
    ]
