import { hash } from 'node:crypto'
import { isIP } from 'node:net'
import { FormatRegistry, Type, type Static, type TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'

type Env = Record<string, string | undefined>

/** The error of `readConfig`. `message` has one line for each mistake, and no value of any variable. */
export class ConfigError extends Error {}

FormatRegistry.Set('base-url', text => {
  if (!URL.canParse(text) || /[?#]/.test(text)) return false
  const url = new URL(text)
  const isEndpoint = /\/(?:track|import|engage|groups)\/*$/.test(url.pathname)
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
const oneOf = <const T extends string>(values: T[], byDefault: T) => Type.Union(
  values.map(value => Type.Literal(value)), { default: byDefault, rule: `must be one of ${values.join(', ')}` }
)
const list = (format: string, rule: string) => Type.Array(Type.String({ format, rule }), { default: [], rule })
const flag = () => Type.Boolean({ default: false, rule: 'must be true or false' })
const secret = (shape: { pattern: string } | { format: string }, rule: string) =>
  Type.String({ ...shape, rule, secret: true })

/** The schema of the environment: each variable with its default and, as `rule`, the text of its error. */
export const Environment = Type.Object({
  MIXPANEL_TOKEN: secret({ pattern: '^[!-~]+$' }, 'must be a project token: printable characters without spaces'),
  MIXPANEL_REGION: oneOf(['us', 'eu', 'in'], 'us'),
  MIXPANEL_URL: Type.Optional(Type.String({
    format: 'base-url', rule: 'must be an http or https base URL, without /track, user, query or fragment'
  })),
  MIXPANEL_ENDPOINT: oneOf(['track', 'import'], 'track'),
  MIXPANEL_STRICT: oneOf(['0', '1'], '0'),
  MIXPANEL_SERVICE_ACCOUNT: Type.Optional(secret({ pattern: '^[^:\\s]+:\\S+$' }, 'must be of the form user:secret')),
  MIXPANEL_PROJECT_ID: Type.Optional(Type.String({ pattern: '^\\d+$', rule: 'must be a number' })),
  MIXPANEL_TIMEOUT_MS: integer(1, 600_000, 5000),
  DEADLINE_MS: integer(1, 600_000, 10_000),
  MAX_BATCH: integer(1, 2000, 50),
  MAX_IN_FLIGHT: integer(1, 1_000_000, 5000),
  MAX_BYTES_IN_FLIGHT: integer(1, 1_000_000_000_000, 67_108_864),
  HOST: Type.String({ default: '127.0.0.1', pattern: '^[0-9A-Za-z.:-]+$', rule: 'must be an address or a host name' }),
  PORT: integer(0, 65_535, 8080),
  LOG_LEVEL: oneOf(['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'], 'info'),
  TRUST_PROXY: list(
    'network', 'must be a comma-separated list of IP addresses or CIDR ranges, none of them /0 or IPv4-mapped'
  ),
  CORS_ORIGINS: list(
    'origin', 'must be a comma-separated list of origins such as https://app.example.com, without path or *'
  ),
  ALLOW_ANONYMOUS: flag(),
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
  DEAD_LETTER_DAYS: Type.Optional(Type.Integer({
    minimum: 1, maximum: 36_500, rule: 'must be an integer from 1 to 36500'
  })),
  SHUTDOWN_DELAY_MS: integer(0, 600_000, 0),
  SHUTDOWN_TIMEOUT_MS: integer(1, 600_000, 10_000)
})

export type Config = Readonly<Static<typeof Environment>>

/** Variables that this version does not support. Ignoring one could leave open what its operator meant to close. */
const UNSUPPORTED = /^(API_KEYS|JWT_[A-Z_]+|METRICS_PORT)(_FILE)?$/

/** The variables that hold secrets. `<NAME>_FILE`, the path of a file with the value, may replace each of them. */
export const SECRETS = Object.entries<TSchema>(Environment.properties)
  .filter(([, schema]) => schema.secret === true).map(([name]) => name)

/**
 * Returns the configuration in `env`: typed, frozen, with defaults filled in. An empty variable counts as unset.
 * `readFile` returns a file's text or throws. Throws a ConfigError that names all mistakes at once.
 */
export function readConfig (env: Env, readFile: (path: string) => string): Config {
  const mistakes = new Map<string, string>()
  const values: Record<string, unknown> = {}
  for (const [name, schema] of Object.entries<TSchema>(Environment.properties)) {
    const isFile = schema.secret === true && Boolean(env[`${name}_FILE`])
    const raw = isFile ? secretFromFile(name, env, readFile, mistakes) : env[name]
    if (raw && schema.type === 'string' && !isBare(raw)) {
      mistakes.set(name, `${name} must not have white space or quotes around its value.`)
    }
    if (raw) values[name] = decode(schema, raw)
  }
  const config = Value.Default(Environment, values) as Config
  for (const { path, schema, value } of Value.Errors(Environment, config)) {
    const name = path.split('/')[1] as string
    if (!mistakes.has(name)) mistakes.set(name, `${name} ${value === undefined ? 'is required' : schema.rule}.`)
  }
  const sentences = [...mistakes.values(), ...conflicts(config, env)]
  if (sentences.length > 0) throw new ConfigError(sentences.join('\n'))
  return Object.freeze(config)
}

/** Returns true for an address that only this machine can reach. */
export function isLoopback (host: string): boolean {
  return host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'))
}

/** Names of a project in the outbox and in Redis, which must not contain the token: 12 hex digits each. */
export interface Project {
  /** Made of MIXPANEL_PROJECT_ID, or of the token when there is none. */
  fingerprint: string
  /** With MIXPANEL_PROJECT_ID: the names that the project had without it, or in the first release. */
  earlier: string[]
}

/** Returns the names of the project that a configuration relays to. */
export function projectOf ({ MIXPANEL_TOKEN: token, MIXPANEL_PROJECT_ID: id }: Config): Project {
  const digest = (text: string) => hash('sha256', `identify-relay:${text}`).slice(0, 12)
  return id === undefined
    ? { fingerprint: digest(`${token}:`), earlier: [] }
    : { fingerprint: digest(`project:${id}`), earlier: [digest(`${token}:`), digest(`${token}:${id}`)] }
}

function conflicts (config: Config, env: Env): string[] {
  const sentences = Object.keys(env).filter(name => UNSUPPORTED.test(name) && env[name])
    .map(name => `${name} is not supported by this version: unset it.`)
  if (config.MIXPANEL_SERVICE_ACCOUNT !== undefined && config.MIXPANEL_PROJECT_ID === undefined) {
    sentences.push('MIXPANEL_SERVICE_ACCOUNT needs MIXPANEL_PROJECT_ID.')
  }
  if (config.OUTBOX.startsWith('file:~')) {
    sentences.push('OUTBOX must not begin with file:~, which only a shell expands.')
  }
  if (config.OUTBOX === 'redis' && config.REDIS_URL === undefined) sentences.push('OUTBOX=redis needs REDIS_URL.')
  const isOpen = Value.Check(Environment.properties.HOST, config.HOST) && !isLoopback(config.HOST)
  if (isOpen && config.ALLOW_ANONYMOUS !== true) {
    sentences.push('HOST is not a loopback address, so any caller that reaches it can merge identities permanently: ' +
      'set ALLOW_ANONYMOUS=true if that is intended.')
  }
  return sentences
}

function secretFromFile (
  name: string, env: Env, readFile: (path: string) => string, mistakes: Map<string, string>
): string | undefined {
  if (env[name]) mistakes.set(name, `${name} and ${name}_FILE must not both be set.`)
  try {
    return readFile(env[`${name}_FILE`] as string).trim()
  } catch (error) {
    mistakes.set(name, `${name}_FILE cannot be read (${(error as NodeJS.ErrnoException).code}).`)
    return undefined
  }
}

/** Returns false if a value has white space at its ends, or the quotes that some env files leave there. */
const isBare = (text: string) => text === text.trim() && !/^["'`]|["'`]$/.test(text)

/** Returns `text` as the type of the schema. Text that does not convert stays text, and the schema refuses it. */
function decode (schema: TSchema, text: string): unknown {
  switch (schema.type) {
    case 'integer': return /^\d{1,15}$/.test(text) ? Number(text) : text
    case 'boolean': return text === 'true' ? true : text === 'false' ? false : text
    case 'array': return text.split(',').map(item => item.trim()).filter(item => item !== '')
    default: return text
  }
}
