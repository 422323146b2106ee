import { isIP } from 'node:net'
import { FormatRegistry, Type } from '@sinclair/typebox'

FormatRegistry.Set('base-url', text => {
  if (!URL.canParse(text) || /[?#]/.test(text)) return false
  const url = new URL(text)
  const isEndpoint = /\/(?:track|import|engage|groups|export)\/*$/.test(url.pathname)
  return /^https?:$/.test(url.protocol) && url.username + url.password === '' && !isEndpoint
})
FormatRegistry.Set('redis-url', text => {
  if (!URL.canParse(text) || !/^rediss?:\/\/\S+$/.test(text)) return false
  try {
    return decodeURIComponent(text) !== ''
  } catch {
    return false
  }
})
// http is for a key server on this machine alone: whoever can change its answer can pose as any user.
FormatRegistry.Set('jwks-url', text => {
  if (!URL.canParse(text) || text.includes('#')) return false
  const { protocol, hostname, username, password } = new URL(text)
  return (protocol === 'https:' || (protocol === 'http:' && isLoopback(hostname))) && username + password === ''
})
FormatRegistry.Set('proxy-url', text => {
  if (!/^https?:\/\//i.test(text) || !URL.canParse(text)) return false
  const { username, password } = new URL(text)
  try {
    return decodeURIComponent(username + password).length >= 0
  } catch {
    return false
  }
})
FormatRegistry.Set('api-key', text => {
  const { key } = splitApiKey(text)
  return /^[!-9;-~]{16,512}$/.test(key) && !/^["'`]|["'`]$/.test(key)
})
FormatRegistry.Set('hs256-secret', text => Buffer.byteLength(text) >= 32)
// Browsers send an origin in lower case and without its default port. Any other form would never match.
FormatRegistry.Set('origin', text => /^[a-z][a-z0-9+.-]*:\/\/[^/?#\s*@]+$/.test(text) &&
  (!/^https?:/.test(text) || (URL.canParse(text) && new URL(text).origin === text)))
// IPv4-mapped IPv6 and /0 are refused, because such a range may trust the whole IPv4 internet.
FormatRegistry.Set('network', text => {
  const [address = '', bits, ...extra] = text.split('/')
  const family = isIP(address)
  const maxBits = family === 4 ? 32 : 128
  const isMapped = family === 6 && new URL(`http://[${address}]`).hostname.startsWith('[::ffff:')
  return family !== 0 && extra.length === 0 && !isMapped &&
    (bits === undefined || (/^\d{1,3}$/.test(bits) && Number(bits) >= 1 && Number(bits) <= maxBits))
})

const integer = (minimum: number, maximum: number, byDefault: number) => Type.Integer({
  minimum, maximum, default: byDefault, rule: `must be an integer from ${minimum} to ${maximum}`
})
const optionalInteger = (minimum: number, maximum: number) => Type.Optional(Type.Integer({
  minimum, maximum, rule: `must be an integer from ${minimum} to ${maximum}`
}))
const oneOf = <const T extends string>(values: T[], byDefault: T) => Type.Union(
  values.map(value => Type.Literal(value)), { default: byDefault, rule: `must be one of ${values.join(', ')}` }
)
const list = (format: string, rule: string) => Type.Array(Type.String({ format, rule }), { default: [], rule })
const flag = () => Type.Boolean({ default: false, rule: 'must be true or false' })
const secret = (shape: { pattern: string } | { format: string }, rule: string) =>
  Type.String({ ...shape, rule, secret: true })

const HOST_PATTERN = '^[0-9A-Za-z.:-]+$'
const HOST_RULE = 'must be an address or a host name'

/** A variable that other programs read as well: `lowerCase` is for its other name, such as https_proxy. */
const proxyUrl = () => Type.Optional(Type.String({
  format: 'proxy-url',
  lowerCase: true,
  rule: 'must be the URL of an HTTP proxy, such as http://proxy.example.com:3128. A SOCKS proxy cannot be used'
}))

const API_KEYS_RULE = 'must be 1 to 100 keys, each as key or name:key, separated by commas or lines. A key has at ' +
  'least 16 printable characters, and no colon, comma, quotes or white space. A name has letters, digits, ., _ and -'

/** The schema of the environment: each variable with its default and, as `rule`, the text of its error. */
export const Environment = Type.Object({
  MIXPANEL_TOKEN: secret({ pattern: '^[!-~]+$' }, 'must be a project token: printable characters without spaces'),
  MIXPANEL_REGION: oneOf(['us', 'eu', 'in'], 'us'),
  MIXPANEL_URL: Type.Optional(Type.String({
    format: 'base-url', rule: 'must be an http or https base URL, without /track, user, query or fragment'
  })),
  ALLOW_HTTP_UPSTREAM: flag(),
  MIXPANEL_ENDPOINT: oneOf(['track', 'import'], 'track'),
  MIXPANEL_STRICT: oneOf(['0', '1'], '0'),
  MIXPANEL_SERVICE_ACCOUNT: Type.Optional(secret({ pattern: '^[^:\\s]+:\\S+$' }, 'must be of the form user:secret')),
  MIXPANEL_PROJECT_ID: Type.Optional(Type.String({ pattern: '^\\d+$', rule: 'must be a number' })),
  MIXPANEL_DATA_URL: Type.Optional(Type.String({
    format: 'base-url', rule: 'must be an http or https base URL, without a path of Mixpanel, user, query or fragment'
  })),
  MIXPANEL_ID_MERGE: oneOf(['original', 'simplified'], 'original'),
  MERGE_EVENT: Type.String({
    default: 'identity association',
    pattern: '^(?!\\$|mp_)[^\\u0000-\\u001f\\u007f-\\u009f]{1,255}$',
    rule: 'must be a name of 1 to 255 characters that does not begin with $ or mp_, which Mixpanel reserves'
  }),
  COMPAT: oneOf(['off', 'identify', 'events'], 'off'),
  ANON_ID_FORMAT: oneOf(['uuid-v4', 'sdk'], 'uuid-v4'),
  MIXPANEL_TIMEOUT_MS: integer(1, 600_000, 5000),
  DEADLINE_MS: integer(1, 600_000, 10_000),
  MAX_BATCH: integer(1, 2000, 50),
  MAX_IN_FLIGHT: integer(1, 1_000_000, 5000),
  MAX_BYTES_IN_FLIGHT: integer(1, 1_000_000_000_000, 67_108_864),
  HOST: Type.String({ default: '127.0.0.1', pattern: HOST_PATTERN, rule: HOST_RULE }),
  PORT: integer(0, 65_535, 8080),
  METRICS_PORT: optionalInteger(0, 65_535),
  METRICS_HOST: Type.Optional(Type.String({ pattern: HOST_PATTERN, rule: HOST_RULE })),
  HTTPS_PROXY: proxyUrl(),
  HTTP_PROXY: proxyUrl(),
  NO_PROXY: Type.Optional(Type.String({ lowerCase: true, isPadded: true })),
  LOG_LEVEL: oneOf(['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'], 'info'),
  TRUST_PROXY: list(
    'network', 'must be a comma-separated list of IP addresses or CIDR ranges, none of them /0 or IPv4-mapped'
  ),
  CORS_ORIGINS: list(
    'origin', 'must be a comma-separated list of origins such as https://app.example.com, without path or *'
  ),
  ALLOW_ANONYMOUS: flag(),
  API_KEYS: Type.Optional(Type.Array(
    Type.String({ format: 'api-key', rule: API_KEYS_RULE }),
    { minItems: 1, maxItems: 100, rule: API_KEYS_RULE, secret: true }
  )),
  JWT_SECRET: Type.Optional(secret({ format: 'hs256-secret' }, 'must have at least 32 bytes')),
  JWT_JWKS_URL: Type.Optional(Type.String({
    format: 'jwks-url', rule: 'must be an https URL, without user or fragment; http only on loopback'
  })),
  JWT_ISSUER: Type.Optional(Type.String()),
  JWT_AUDIENCE: Type.Optional(Type.String()),
  JWT_CLAIM: Type.String({ default: 'sub' }),
  MAX_ANON_PER_USER: optionalInteger(1, 1_000_000),
  MAX_USERS_PER_ANON: optionalInteger(1, 1_000_000),
  MERGE_GUARD_WINDOW_MS: integer(1, 31_536_000_000, 86_400_000),
  MERGE_GUARD: oneOf(['refuse', 'warn'], 'refuse'),
  RATE_LIMIT_MAX: integer(1, 1_000_000_000, 6000),
  RATE_LIMIT_WINDOW_MS: integer(1, 86_400_000, 60_000),
  MAX_CONNECTIONS: integer(1, 1_000_000, 4096),
  DOCS: Type.Optional(Type.Boolean({ rule: 'must be true or false' })),
  REDIS_URL: Type.Optional(secret({ format: 'redis-url' }, 'must be a redis:// or rediss:// URL')),
  OUTBOX: Type.String({
    default: 'off',
    pattern: '^(off|redis|file:.+)$',
    rule: 'must be off, redis or file:<directory>'
  }),
  OUTBOX_MAX_BYTES: integer(1, 1_000_000_000_000, 1_073_741_824),
  DEAD_LETTER_DAYS: optionalInteger(1, 36_500),
  SHUTDOWN_DELAY_MS: integer(0, 600_000, 0),
  SHUTDOWN_TIMEOUT_MS: integer(1, 600_000, 10_000)
})

/** Returns true for an address that only this machine can reach, also for the `hostname` of a URL. */
export function isLoopback (host: string): boolean {
  return ['localhost', '::1', '[::1]'].includes(host) || (isIP(host) === 4 && host.startsWith('127.'))
}

/** Returns the parts of an entry of API_KEYS: `key`, or `name:key`. A key has no colon. */
export function splitApiKey (entry: string): { name?: string, key: string } {
  const [, name, key] = /^([\w.-]{1,64}):(.*)$/s.exec(entry) ?? []
  return name === undefined || key === undefined ? { key: entry } : { name, key }
}
