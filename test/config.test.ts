import { readFileSync } from 'node:fs'
import { t } from 'tap'
import { ConfigError, readConfig, SECRETS } from '#src/config.js'
import { Environment, isLoopback } from '#src/environment.js'

const good = { MIXPANEL_TOKEN: 'CANARY-SECRET' }
const KEY = 'canary-key-0123456789'
const read = (env: Record<string, string | undefined>, files: Record<string, string> = {}) => readConfig(env, path => {
  if (files[path] === undefined) throw Object.assign(new Error('no such file'), { code: 'ENOENT' })
  return files[path]
})
const mistakes = (env: Record<string, string | undefined>, files = {}) => {
  try {
    read(env, files)
    return []
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    return error.message.split('\n')
  }
}

t.test('the defaults are those of the documentation', async t => {
  const config = read({ ...good, PORT: '', CORS_ORIGINS: '', MIXPANEL_URL: '' })
  t.match(config, {
    MIXPANEL_TOKEN: 'CANARY-SECRET',
    MIXPANEL_REGION: 'us',
    MIXPANEL_ENDPOINT: 'track',
    MIXPANEL_TIMEOUT_MS: 5000,
    DEADLINE_MS: 10_000,
    MAX_BATCH: 50,
    MAX_IN_FLIGHT: 5000,
    HOST: '127.0.0.1',
    PORT: 8080,
    TRUST_PROXY: [],
    CORS_ORIGINS: [],
    ALLOW_ANONYMOUS: false,
    RATE_LIMIT_MAX: 6000,
    MAX_BYTES_IN_FLIGHT: 67_108_864,
    MAX_CONNECTIONS: 4096,
    DOCS: undefined,
    OUTBOX: 'off',
    SHUTDOWN_DELAY_MS: 0
  })
  t.ok(Object.isFrozen(config))
  t.notOk('MIXPANEL_URL' in config)
})

t.test('lists, numbers, flags and secret files are read', async t => {
  t.match(read({ ...good, CORS_ORIGINS: ' https://a.example , http://localhost:3000', TRUST_PROXY: '10.0.0.0/8,::1,2001:db8::/32' }), {
    CORS_ORIGINS: ['https://a.example', 'http://localhost:3000'], TRUST_PROXY: ['10.0.0.0/8', '::1', '2001:db8::/32']
  })
  t.equal(read({ ...good, ALLOW_ANONYMOUS: 'false' }).ALLOW_ANONYMOUS, false)
  t.match(read({ ...good, HOST: '0.0.0.0', ALLOW_ANONYMOUS: 'true', PORT: '0' }), { HOST: '0.0.0.0', ALLOW_ANONYMOUS: true, PORT: 0 })
  t.equal(read({ MIXPANEL_TOKEN_FILE: '/run/token' }, { '/run/token': 'from-file\n' }).MIXPANEL_TOKEN, 'from-file')
  for (const host of ['127.0.0.1', '127.8.8.8', '::1', 'localhost']) t.ok(isLoopback(host))
  for (const host of ['0.0.0.0', '::', '10.0.0.1', '127.evil.test', 'example.com']) t.notOk(isLoopback(host))
})

t.test('API keys come one a line from a file, and https or loopback need no permission', async t => {
  const second = 'canary-key-9876543210'
  t.same(read({ ...good, API_KEYS: `web:${KEY},${second}` }).API_KEYS, [`web:${KEY}`, second])
  t.same(read({ ...good, API_KEYS_FILE: '/run/keys' }, { '/run/keys': `web:${KEY}\r\n\n${second}\n` }).API_KEYS, [`web:${KEY}`, second])
  for (const env of [{ API_KEYS: KEY }, { JWT_SECRET: 's'.repeat(32) }, { JWT_SECRET: 'ß'.repeat(16) }, { JWT_JWKS_URL: 'https://idp.example/keys' }]) {
    t.equal(read({ ...good, ...env, HOST: '0.0.0.0' }).HOST, '0.0.0.0', 'credentials permit any HOST')
  }
  for (const url of ['http://127.0.0.1:8081', 'http://localhost', 'http://[::1]:1', 'https://gateway.example']) t.equal(read({ ...good, MIXPANEL_URL: url }).MIXPANEL_URL, url)
  t.equal(read({ ...good, MIXPANEL_URL: 'http://gateway.example', ALLOW_HTTP_UPSTREAM: 'true' }).ALLOW_HTTP_UPSTREAM, true)
  for (const url of ['http://127.0.0.1:9/keys', 'http://[::1]:9/keys']) t.equal(read({ ...good, JWT_JWKS_URL: url }).JWT_JWKS_URL, url)
})

t.test('each mistake is one sentence that shows no value', async t => {
  const rows: [env: Record<string, string>, sentence: RegExp][] = [
    [{ MIXPANEL_TOKEN: '' }, /^MIXPANEL_TOKEN is required\.$/],
    [{ MIXPANEL_TOKEN: 'two words' }, /^MIXPANEL_TOKEN must be a project token/],
    ...['"t"', "'t'", '"t', 't`', ' t', 't\t'].map(token => [{ MIXPANEL_TOKEN: token }, /^MIXPANEL_TOKEN must not have white space or quotes around its value\.$/] as [Record<string, string>, RegExp]),
    [{ MIXPANEL_TOKEN: '', MIXPANEL_TOKEN_FILE: '/run/quoted' }, /^MIXPANEL_TOKEN must not have white space or quotes/],
    [{ OUTBOX: 'file:/d/data ' }, /^OUTBOX must not have white space or quotes/],
    [{ OUTBOX: 'file:~/data' }, /^OUTBOX must not begin with file:~/],
    ...['https://api.mixpanel.com/track', 'https://gateway.example/mixpanel/import/'].map(url => [{ MIXPANEL_URL: url }, /^MIXPANEL_URL must be .*without \/track/] as [Record<string, string>, RegExp]),
    [{ MIXPANEL_TOKEN_FILE: '/run/token' }, /^MIXPANEL_TOKEN and MIXPANEL_TOKEN_FILE must not both be set\.$/],
    [{ MIXPANEL_TOKEN: '', MIXPANEL_TOKEN_FILE: '/run/none' }, /^MIXPANEL_TOKEN_FILE cannot be read \(ENOENT\)\.$/],
    [{ MIXPANEL_TOKEN: '', MIXPANEL_TOKEN_FILE: '/run/empty' }, /^MIXPANEL_TOKEN_FILE is empty\.$/],
    ...['API_KEYS', 'JWT_SECRET', 'REDIS_URL'].map(name => [{ [`${name}_FILE`]: '/run/empty' }, new RegExp(`^${name}_FILE is empty\\.$`)] as [Record<string, string>, RegExp]),
    ...['http://api.mixpanel.com', 'http://10.0.0.1', 'http://localhost.evil.test'].map(url => [{ MIXPANEL_URL: url }, /^MIXPANEL_URL must be https.*ALLOW_HTTP_UPSTREAM=true/] as [Record<string, string>, RegExp]),
    [{ ALLOW_HTTP_UPSTREAM: '1' }, /^ALLOW_HTTP_UPSTREAM must be true or false\.$/],
    ...['too-short', `name:${'k'.repeat(15)}`, Array.from({ length: 101 }, (_, index) => `${KEY}-${index}`).join(), ',', `${KEY}, ${KEY}2`, `"${KEY}"`, `name:'${KEY}'`, ` ${KEY}`, `a:b:${KEY}`, `a b:${KEY}`, `:${KEY}`, 'k'.repeat(513), 'schlüssel-schlüssel']
      .map(keys => [{ API_KEYS: keys }, /^API_KEYS must be 1 to 100 keys, each as key or name:key/] as [Record<string, string>, RegExp]),
    [{ API_KEYS: `a:${KEY},b:${KEY}` }, /^API_KEYS must not contain a key twice\.$/],
    [{ JWT_SECRET: 's'.repeat(31) }, /^JWT_SECRET must have at least 32 bytes\.$/],
    [{ JWT_SECRET: `'${'s'.repeat(40)}'` }, /^JWT_SECRET must not have white space or quotes/],
    ...['http://idp.example/keys', 'ftp://x', 'x', 'https://u:p@idp.example/keys', 'https://idp.example/keys#a'].map(url => [{ JWT_JWKS_URL: url }, /^JWT_JWKS_URL must be an https URL/] as [Record<string, string>, RegExp]),
    [{ JWT_SECRET: 's'.repeat(32), JWT_JWKS_URL: 'https://idp.example/keys' }, /^JWT_SECRET and JWT_JWKS_URL must not both be set\.$/],
    ...['JWT_ISSUER', 'JWT_AUDIENCE', 'JWT_CLAIM'].map(name => [{ [name]: 'x' }, new RegExp(`^${name} needs JWT_SECRET or JWT_JWKS_URL\\.$`)] as [Record<string, string>, RegExp]),
    ...['MAX_ANON_PER_USER', 'MAX_USERS_PER_ANON', 'MERGE_GUARD_WINDOW_MS'].map(name => [{ [name]: '0' }, new RegExp(`^${name} must be an integer from 1 to`)] as [Record<string, string>, RegExp]),
    [{ MIXPANEL_ID_MERGE: 'legacy' }, /^MIXPANEL_ID_MERGE must be one of original, simplified\.$/],
    [{ ANON_ID_FORMAT: 'any' }, /^ANON_ID_FORMAT must be one of uuid-v4, sdk\.$/],
    ...['$identify', '$merge', '$create_alias', 'mp_x', 'a\nb', 'x'.repeat(256)].map(name => [{ MERGE_EVENT: name }, /^MERGE_EVENT must be a name of 1 to 255 characters that does not begin with \$ or mp_/] as [Record<string, string>, RegExp]),
    [{ MERGE_EVENT: ' x' }, /^MERGE_EVENT must not have white space or quotes/],
    [{ MIXPANEL_DATA_URL: 'https://data.mixpanel.com/api/2.0/export' }, /^MIXPANEL_DATA_URL must be an http or https base URL/],
    [{ MIXPANEL_DATA_URL: 'http://data.example' }, /^MIXPANEL_DATA_URL must be https.*ALLOW_HTTP_UPSTREAM=true/],
    [{ MERGE_GUARD: 'off' }, /^MERGE_GUARD must be one of refuse, warn\.$/],
    [{ MIXPANEL_REGION: 'mars' }, /^MIXPANEL_REGION must be one of us, eu, in\.$/],
    ...['ftp://x', 'x', 'http://u:p@x', 'http://x?a=1', 'http://x?', 'http://x#y'].map(url => [{ MIXPANEL_URL: url }, /^MIXPANEL_URL must be/] as [Record<string, string>, RegExp]),
    [{ MIXPANEL_ENDPOINT: 'engage' }, /^MIXPANEL_ENDPOINT must be one of track, import\.$/],
    [{ MIXPANEL_STRICT: 'yes' }, /^MIXPANEL_STRICT must be one of 0, 1\.$/],
    [{ MIXPANEL_SERVICE_ACCOUNT: 'x', MIXPANEL_PROJECT_ID: '1' }, /^MIXPANEL_SERVICE_ACCOUNT must be of the form user:secret\.$/],
    [{ MIXPANEL_SERVICE_ACCOUNT: 'x:y' }, /^MIXPANEL_SERVICE_ACCOUNT needs MIXPANEL_PROJECT_ID\.$/],
    [{ MIXPANEL_SERVICE_ACCOUNT: 'x:y', MIXPANEL_PROJECT_ID: 'p' }, /^MIXPANEL_PROJECT_ID must be a number\.$/],
    ...['-1', '1.5', '1e3', '0x10', ' 5', '65536', 'NaN', '99999999999999999'].map(port => [{ PORT: port }, /^PORT must be an integer from 0 to 65535\.$/] as [Record<string, string>, RegExp]),
    [{ MAX_BATCH: '0' }, /^MAX_BATCH must be an integer from 1 to 2000\.$/],
    [{ DEADLINE_MS: '0' }, /^DEADLINE_MS must be an integer from 1/],
    [{ HOST: 'a b' }, /^HOST must be/],
    [{ HOST: '0.0.0.0' }, /^HOST is not a loopback address.*ALLOW_ANONYMOUS=true/],
    [{ HOST: '::' }, /^HOST is not a loopback address/],
    [{ ALLOW_ANONYMOUS: 'yes' }, /^ALLOW_ANONYMOUS must be true or false\.$/],
    [{ LOG_LEVEL: 'loud' }, /^LOG_LEVEL must be one of/],
    ...['true', '1', '0.0.0.0/0', '::/0', '::ffff:10.0.0.0/104', '0::ffff:a00:0/97', '10.0.0.0/33', '10.0.0.0/8/8', '10.0.0', 'proxy', '10.0.0.0/'].map(range => [{ TRUST_PROXY: range }, /^TRUST_PROXY must be a comma-separated list/] as [Record<string, string>, RegExp]),
    ...['*', 'null', 'app.example.com', 'https://app.example.com/', 'https://App.example.com', 'https://a.example:443', 'https://*.example.com', 'https://a.example/x'].map(origin => [{ CORS_ORIGINS: origin }, /^CORS_ORIGINS must be a comma-separated list/] as [Record<string, string>, RegExp]),
    ...['memory', 'file:', 'File:/x', 'redis://x'].map(outbox => [{ OUTBOX: outbox }, /^OUTBOX must be off, redis or file:<directory>\.$/] as [Record<string, string>, RegExp]),
    [{ OUTBOX: 'redis' }, /^OUTBOX=redis needs REDIS_URL\.$/],
    ...['localhost:6379', 'http://x', 'redis://', 'redis://x:99999', 'redis://x y', 'redis://:%ff@x', 'redis://:%@x'].map(url => [{ REDIS_URL: url }, /^REDIS_URL must be a redis:\/\/ or rediss:\/\/ URL\.$/] as [Record<string, string>, RegExp]),
    [{ METRICS_PORT: 'x' }, /^METRICS_PORT must be an integer from 0 to 65535\.$/],
    [{ METRICS_PORT: '8080' }, /^METRICS_PORT and PORT must differ\.$/],
    [{ METRICS_HOST: '127.0.0.1' }, /^METRICS_HOST needs METRICS_PORT\.$/],
    [{ METRICS_PORT: '9464', METRICS_HOST: '127.0.0.1:80/' }, /^METRICS_HOST must be an address or a host name\.$/]
  ]
  for (const [env, sentence] of rows) {
    const found = mistakes({ ...good, ...env }, { '/run/token': 'CANARY-SECRET', '/run/empty': '\n', '/run/quoted': '"CANARY-SECRET"\n' })
    t.equal(found.length, 1, JSON.stringify(env))
    t.match(found[0], sentence, JSON.stringify(env))
    t.notMatch(found.join(), /CANARY|canary|two words|u:p/)
  }
  t.same(mistakes({ PORT: 'x', MAX_BATCH: '0', HOST: '0.0.0.0' }).map(sentence => sentence.split(' ')[0]), ['MIXPANEL_TOKEN', 'MAX_BATCH', 'PORT', 'HOST'])
})

t.test('docs/configuration.md and .env.example name every variable and its default', async t => {
  const example = readFileSync('.env.example', 'utf8')
  const page = readFileSync('docs/configuration.md', 'utf8')
  const rows = (text: string) => [...text.matchAll(/^\| `([A-Z_]+)`(?: ⚿)? \| (.*?) \|/gm)].map(([, name, value]) => [name, value])
  const documented = rows(page)
  t.same(documented.map(([name]) => name).sort(), Object.keys(Environment.properties).sort())
  for (const [name, schema] of Object.entries(Environment.properties) as [string, { default?: unknown }][]) {
    t.match(example, new RegExp(`^#?${name}=`, 'm'), `${name} in .env.example`)
    const value = schema.default
    const told = Object.fromEntries(documented)[name]
    if (value !== undefined && String(value) !== '') t.equal(told, `\`${value}\``, name)
  }
  for (const name of SECRETS) t.match(page, `\`${name}\` ⚿`)
  const usual = rows(readFileSync('README.md', 'utf8'))
  t.equal(usual.length, 9)
  for (const [name, value] of usual) t.equal(value, Object.fromEntries(documented)[name!], `${name} in README.md`)
})
