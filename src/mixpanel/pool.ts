import { createRequire } from 'node:module'
import type undici from 'undici'

/**
 * undici's Pool without the rest of undici (fetch, WebSocket, caches, …), which would add some 50 ms to every start and
 * 10 MB to every process: `npm run bench:imports` prints both. The path is not public, so package.json pins undici to
 * its minor version, and test/config.test.ts checks that the path is there.
 */
export const Pool = createRequire(import.meta.url)('undici/lib/dispatcher/pool.js') as typeof undici.Pool
