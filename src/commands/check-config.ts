import type { TSchema } from '@sinclair/typebox'
import { nameIn, unknownVariables, type Config, type Env } from '../config.ts'
import { Environment, isLoopback, splitApiKey } from '../environment.ts'
import { createApiKeys } from '../http/callers/api-keys.ts'
import { baseUrl } from '../mixpanel/client.ts'
import { dataUrl } from '../mixpanel/export.ts'
import { describeProxy } from '../proxy.ts'

/** Returns the URL of a host and a port. */
const urlOf = (host: string, port: number) => `http://${host.includes(':') ? `[${host}]` : host}:${port}`

/**
 * Returns the effective configuration for people: a line `NAME=value # source` for each variable, and a last line with
 * the addresses. It holds no secret: a secret is `***`, and API keys have the names that the log has.
 */
export function describeConfig (config: Config, env: Env): string {
  const lines = Object.entries<TSchema>(Environment.properties).map(([name, schema]) => {
    const value = valueOf(name as keyof Config, schema, config)
    return `${name}=${value} # ${sourceOf(name, schema, env, value)}`
  })
  const sentence = `The configuration is valid: ${urlOf(config.HOST, config.PORT)} relays to ${baseUrl(config)}.`
  const unknown = unknownVariables(env).map(name => `# ${name} is no variable of the relay, and has no effect.`)
  return [...lines, ...unknown, sentence].join('\n')
}

function valueOf (name: keyof Config, schema: TSchema, config: Config): string {
  const value = config[name]
  switch (name) {
    case 'API_KEYS': return (config.API_KEYS ?? []).map(labelOf).join(',')
    case 'MIXPANEL_URL': return baseUrl(config)
    case 'MIXPANEL_DATA_URL': return dataUrl(config)
    case 'DOCS': return String(value ?? isLoopback(config.HOST))
    case 'HTTPS_PROXY':
    case 'HTTP_PROXY': return value === undefined ? '' : describeProxy({ url: new URL(String(value)) })
    // A query may have a key.
    case 'JWT_JWKS_URL': return String(value ?? '').replace(/\?.*$/, '?***')
    default: return value === undefined ? '' : schema.secret === true ? '***' : String(value).replace(/\p{Cc}/gu, ' ')
  }
}

/** Returns the name of an API key in the log. */
function labelOf (entry: string): string {
  return String(createApiKeys([entry])(splitApiKey(entry).key)?.label)
}

function sourceOf (name: string, schema: TSchema, env: Env, value: string): string {
  const file = env[`${name}_FILE`]
  if (schema.secret === true && file) return `file ${file}`
  const given = nameIn(env, name)
  if (env[given]) return given === name ? 'environment' : `environment, as ${given}`
  return value === '' ? 'not set' : 'default'
}
