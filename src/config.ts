import { hash } from 'node:crypto'
import type { Static, TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { Environment, isLoopback, splitApiKey } from './environment.ts'
import { proxyFor } from './proxy.ts'

/** Environment variables. */
export type Env = Record<string, string | undefined>

/** The error of `readConfig`. `message` has one line for each mistake, and no value of any variable. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'
}

export type Config = Readonly<Static<typeof Environment>>

/**
 * Returns the variables in `env` that Kubernetes has set for a Service, such as METRICS_PORT for one that is called
 * `metrics`. They are no configuration.
 */
export const serviceLinks = (env: Env) => Object.keys(Environment.properties)
  .filter(name => name.endsWith('_PORT') && /^(?:tcp|udp|sctp):\/\//.test(env[name] ?? ''))

/** The variables that hold secrets. `<NAME>_FILE`, the path of a file with the value, may replace each of them. */
export const SECRETS = Object.entries<TSchema>(Environment.properties)
  .filter(([, schema]) => schema.secret === true).map(([name]) => name)

/**
 * Returns the variables in `env` that look like some of the relay's and are none: a misspelt one has no effect. What
 * Kubernetes sets for a Service that is called `mixpanel` is not meant.
 */
export const unknownVariables = (env: Env) => Object.keys(env).filter(name => /^MIXPANEL_/.test(name) &&
  !/_(?:PORT|SERVICE)(?:_|$)/.test(name) && !(name in Environment.properties) && !FILES.has(name))

/** The variables that name the file of a secret. */
const FILES = new Set(SECRETS.map(name => `${name}_FILE`))

/** Returns every secret of a configuration, the parts of URLs and of accounts included. */
export function secretsOf (config: Config): string[] {
  const { REDIS_URL: redis, MIXPANEL_SERVICE_ACCOUNT: account } = config
  const password = redis === undefined ? '' : decodeURIComponent(new URL(redis).password)
  const values = [
    config.MIXPANEL_TOKEN, account, account?.replace(/^[^:]*:/, ''), config.JWT_SECRET, redis, password,
    ...(config.API_KEYS ?? []).map(entry => splitApiKey(entry).key)
  ]
  return values.filter((value): value is string => value !== undefined && value !== '')
}

/** The variables that have a second name in lower case. */
const IN_LOWER_CASE = Object.entries<TSchema>(Environment.properties)
  .filter(([, schema]) => schema.lowerCase === true).map(([name]) => name)

/** Returns the name under which `env` has a variable. In lower case it wins, as with curl and undici. */
export function nameIn (env: Env, name: string): string {
  const other = name.toLowerCase()
  return IN_LOWER_CASE.includes(name) && env[other] ? other : name
}

/** Returns the names of all variables in `env` that hold a secret. The URL of a proxy may have a password. */
export const sensitiveNames = (env: Env) => [
  ...SECRETS,
  ...IN_LOWER_CASE.flatMap(name => [name, name.toLowerCase()]).filter(name => env[name]?.includes('@'))
]

/** Returns the names of the secrets that `env` takes from files, each with its path. */
export const secretFiles = (env: Env): [name: string, path: string][] =>
  SECRETS.flatMap(name => env[`${name}_FILE`] ? [[name, env[`${name}_FILE`] as string]] : [])

/**
 * Returns the configuration in `env`: typed, frozen, with defaults filled in. An empty variable counts as unset.
 * `readFile` returns a file's text or throws. Throws a ConfigError that names all mistakes at once.
 */
export function readConfig (env: Env, readFile: (path: string) => string): Config {
  const mistakes = new Map<string, string>()
  const values: Record<string, unknown> = {}
  const links = serviceLinks(env)
  for (const [name, schema] of Object.entries<TSchema>(Environment.properties)) {
    const isFile = schema.secret === true && Boolean(env[`${name}_FILE`])
    const given = nameIn(env, name)
    const text = isFile ? secretFromFile(name, env, readFile, mistakes) : links.includes(name) ? '' : env[given]
    const raw = schema.isPadded === true ? text?.trim() : text
    if (raw && schema.type === 'string' && !isBare(raw)) {
      mistakes.set(name, `${given} must not have white space or quotes around its value.`)
    }
    if (raw) values[name] = decode(schema, raw)
  }
  const config = Value.Default(Environment, values) as Config
  for (const { path, schema, value } of Value.Errors(Environment, config)) {
    const name = path.split('/')[1] as string
    const problem = value === undefined ? 'is required' : schema.rule
    if (!mistakes.has(name)) mistakes.set(name, `${nameIn(env, name)} ${problem}.`)
  }
  const sentences = [...mistakes.values(), ...conflicts(config, env)]
  if (sentences.length > 0) throw new ConfigError(sentences.join('\n'))
  return Object.freeze(config)
}

/** Names of a project in the outbox and in Redis, which must not contain the token: 12 hex digits each. */
export interface ProjectNames {
  /** Made of the mode, and of MIXPANEL_PROJECT_ID, or of the token when there is none. */
  fingerprint: string
  /** With MIXPANEL_PROJECT_ID: the names that the project had without it, or in the first release. */
  earlier: string[]
}

/** `otherMode` has the names under which a relay with another MIXPANEL_ID_MERGE stores the project's events. */
export interface Project extends ProjectNames { otherMode: ProjectNames }

/** Returns the names of the project that a configuration relays to. */
export function projectOf (config: Config): Project {
  const isOriginal = config.MIXPANEL_ID_MERGE === 'original'
  const [original, simplified] = [namesOf(config, ''), namesOf(config, 'simplified:')]
  return isOriginal ? { ...original, otherMode: simplified } : { ...simplified, otherMode: original }
}

function namesOf ({ MIXPANEL_TOKEN: token, MIXPANEL_PROJECT_ID: id }: Config, mode: string): ProjectNames {
  const digest = (text: string) => hash('sha256', `identify-relay:${mode}${text}`).slice(0, 12)
  return id === undefined
    ? { fingerprint: digest(`${token}:`), earlier: [] }
    : { fingerprint: digest(`project:${id}`), earlier: [digest(`${token}:`), digest(`${token}:${id}`)] }
}

/** Returns true if users can prove who they are, with a token. */
export const hasUserTokens = (config: Config) => config.JWT_SECRET !== undefined || config.JWT_JWKS_URL !== undefined

/** Returns true if callers can prove who they are, with an API key or a user's token. */
export const hasCredentials = (config: Config) => config.API_KEYS !== undefined || hasUserTokens(config)

/** Returns true if any caller may do anything, because only processes on this machine can be callers. */
export const isOpenLoopback = (config: Config) => !hasCredentials(config) && isLoopback(config.HOST)

const UPSTREAMS = ['MIXPANEL_URL', 'MIXPANEL_DATA_URL'] as const

/** Returns the variables whose URL would carry a secret unencrypted to another machine. */
export const plainUpstreams = (config: Config) => UPSTREAMS.filter(name => {
  const url = config[name]
  // An invalid URL has an error of its own.
  if (url === undefined || !Value.Check(Environment.properties[name], url)) return false
  return new URL(url).protocol === 'http:' && leavesMachine(config, url)
})

/** Returns true if requests to an http URL go to another machine: a proxy there would read even those to loopback. */
function leavesMachine (config: Config, url: string): boolean {
  return !isLoopback(new URL(url).hostname) || isProxied(config, url)
}

/** Returns true if an http URL is reached through a proxy on another machine. */
function isProxied (config: Config, url: string): boolean {
  // An invalid proxy has an error of its own.
  if (!Value.Check(Environment.properties.HTTP_PROXY, config.HTTP_PROXY)) return false
  const proxy = proxyFor(config, url)
  return proxy !== undefined && !isLoopback(proxy.url.hostname)
}

/** Returns a sentence for each rule between variables that is broken. */
function conflicts (config: Config, env: Env): string[] {
  const isSet = (name: string) => Boolean(env[name] || env[`${name}_FILE`])
  const hasJwt = isSet('JWT_SECRET') || isSet('JWT_JWKS_URL')
  const keys = config.API_KEYS instanceof Array ? config.API_KEYS.map(entry => splitApiKey(String(entry)).key) : []
  const isOpen = Value.Check(Environment.properties.HOST, config.HOST) && !isLoopback(config.HOST)
  const rules: [isBroken: boolean, sentence: string][] = [
    [isSet('METRICS_HOST') && config.METRICS_PORT === undefined, 'METRICS_HOST needs METRICS_PORT.'],
    [config.METRICS_PORT === config.PORT && config.PORT !== 0, 'METRICS_PORT and PORT must differ.'],
    [isSet('MIXPANEL_SERVICE_ACCOUNT') && !isSet('MIXPANEL_PROJECT_ID'),
      'MIXPANEL_SERVICE_ACCOUNT needs MIXPANEL_PROJECT_ID.'],
    ...plainUpstreams(config).map((name): [boolean, string] => [config.ALLOW_HTTP_UPSTREAM !== true,
      `${name} must be https, because http would carry secrets unencrypted to another machine` +
      `${isProxied(config, String(config[name])) ? ', the proxy: name its host in NO_PROXY, or ' : ': '}` +
      'set ALLOW_HTTP_UPSTREAM=true if that is intended.']),
    [isPlainJwks(config), 'JWT_JWKS_URL must not be http through a proxy, which could pose as any user: ' +
      'name its host in NO_PROXY.'],
    [config.OUTBOX.startsWith('file:~'), 'OUTBOX must not begin with file:~, which only a shell expands.'],
    [config.OUTBOX === 'redis' && !isSet('REDIS_URL'), 'OUTBOX=redis needs REDIS_URL.'],
    [new Set(keys).size < keys.length, 'API_KEYS must not contain a key twice.'],
    [isSet('JWT_SECRET') && isSet('JWT_JWKS_URL'), 'JWT_SECRET and JWT_JWKS_URL must not both be set.'],
    ...['JWT_ISSUER', 'JWT_AUDIENCE', 'JWT_CLAIM'].map((name): [boolean, string] =>
      [isSet(name) && !hasJwt, `${name} needs JWT_SECRET or JWT_JWKS_URL.`]),
    [isOpen && !isSet('API_KEYS') && !hasJwt && config.ALLOW_ANONYMOUS !== true,
      'HOST is not a loopback address, so any caller that reaches it can merge identities permanently: ' +
      'set API_KEYS, JWT_SECRET or JWT_JWKS_URL, or ALLOW_ANONYMOUS=true if that is intended.']
  ]
  return rules.filter(([isBroken]) => isBroken).map(([, sentence]) => sentence)
}

/** Returns true if a valid JWT_JWKS_URL is http, so on loopback, and a proxy on another machine would answer it. */
function isPlainJwks (config: Config): boolean {
  const { JWT_JWKS_URL: url } = config
  return url !== undefined && Value.Check(Environment.properties.JWT_JWKS_URL, url) &&
    new URL(url).protocol === 'http:' && isProxied(config, url)
}

function secretFromFile (
  name: string, env: Env, readFile: (path: string) => string, mistakes: Map<string, string>
): string | undefined {
  if (env[name]) mistakes.set(name, `${name} and ${name}_FILE must not both be set.`)
  try {
    const text = readFile(env[`${name}_FILE`] as string).trim()
    // An empty file may be half written. It must not open what its secret is meant to close.
    if (text === '') mistakes.set(name, `${name}_FILE is empty.`)
    return text
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
    // White space around a secret is a mistake; lines are for files.
    case 'array': return schema.secret === true
      ? text.split(/[,\r\n]+/).filter(item => item !== '')
      : text.split(',').map(item => item.trim()).filter(item => item !== '')
    default: return text
  }
}
