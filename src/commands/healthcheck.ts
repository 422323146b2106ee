import type { Config } from '../config.ts'

/** Resolves with a sentence when the configured relay answers `/livez` within 2 s. Otherwise rejects with one. */
export async function healthcheck ({ HOST, PORT }: Config): Promise<string> {
  const host = { '0.0.0.0': '127.0.0.1', '::': '::1' }[HOST] ?? HOST
  try {
    const response = await fetch(`${urlOf(host, PORT)}/livez`, { signal: AbortSignal.timeout(2000) })
    if (!response.ok) throw new Error(`/livez answered ${response.status}`)
    return 'The relay is alive.'
  } catch (error) {
    const { message } = (error as Error).cause as Error | undefined ?? error as Error
    throw new Error(`The relay is not alive: ${message}.`)
  }
}

/** Returns the URL of a host and a port. */
export const urlOf = (host: string, port: number) => `http://${host.includes(':') ? `[${host}]` : host}:${port}`
