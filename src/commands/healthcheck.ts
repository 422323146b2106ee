import type { Config } from '../config.ts'

/** For HEALTHCHECK. Returns a sentence if the relay that the configuration describes is alive, else throws one. */
export async function healthcheck ({ HOST, PORT }: Config): Promise<string> {
  const host = { '0.0.0.0': '127.0.0.1', '::': '::1' }[HOST] ?? HOST
  try {
    const answer = await fetch(`${urlOf(host, PORT)}/livez`, { signal: AbortSignal.timeout(2000) })
    if (!answer.ok) throw new Error(`/livez answered ${answer.status}`)
    return 'The relay is alive.'
  } catch (error) {
    const { message } = (error as Error).cause as Error | undefined ?? error as Error
    throw new Error(`The relay is not alive: ${message}.`)
  }
}

/** The address as a URL. */
export const urlOf = (host: string, port: number) => `http://${host.includes(':') ? `[${host}]` : host}:${port}`
