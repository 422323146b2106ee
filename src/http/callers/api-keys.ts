import { hash, timingSafeEqual } from 'node:crypto'
import { splitApiKey } from '../../environment.ts'
import { shortDigest, type Caller } from './caller.ts'

/** Returns a function that finds the caller of an API key. `entries` are those of API_KEYS; only digests are kept. */
export function createApiKeys (entries: string[] = []): (key: string) => Caller | undefined {
  const services = entries.map(splitApiKey).map(({ name, key }): { digest: Buffer, caller: Caller } => ({
    digest: Buffer.from(hash('sha256', key)),
    caller: { kind: 'key', label: `key:${name ?? shortDigest(key).slice(0, 8)}`, limitKey: `key:${shortDigest(key)}` }
  }))
  // With users alone no token is hashed here.
  if (services.length === 0) return () => undefined
  // A new buffer for each request would cost twice the hash.
  const presented = Buffer.alloc(64)
  return key => {
    presented.write(hash('sha256', key), 'latin1')
    let found: Caller | undefined
    // Digests of equal length, and no early exit: the time says nothing about the keys.
    for (const { digest, caller } of services) {
      if (timingSafeEqual(digest, presented)) found = caller
    }
    return found
  }
}
