import type { Config } from '../../config.ts'
import { silentLog } from '../../log.ts'
import { connectRedis, type Redis } from '../../redis.ts'
import { failed, ok, warning, type Finding } from './check.ts'

/** Checks the Redis of REDIS_URL: its role and, when it holds the outbox, what a 202 is worth there. */
export async function checkRedis (config: Config): Promise<Finding> {
  const url = String(config.REDIS_URL)
  const { host } = new URL(url)
  let redis: Redis
  try {
    redis = await connectRedis(url, silentLog)
  } catch (error) {
    return failed(`${host}: ${(error as Error).message.replace('REDIS_URL: ', '')}`,
      'check that it runs, and its user and password')
  }
  try {
    const role = await ask(redis.role().then(([name]) => String(name)))
    if (role === 'slave') return failed(`${host} is a replica`, 'name the primary in REDIS_URL')
    if (config.OUTBOX !== 'redis') return ok(`${host} answers, and has only rate limits (OUTBOX=${config.OUTBOX})`)
    const setting = (name: string) => ask(redis.config('GET', name).then(pair => String((pair as string[])[1])))
    const appendonly = await setting('appendonly')
    if (appendonly === undefined) {
      return ok(`${host} answers. It refuses CONFIG, so its durability cannot be told: its operator must ensure ` +
        'appendonly yes, appendfsync always and maxmemory-policy noeviction')
    }
    const [fsync, policy] = [await setting('appendfsync'), await setting('maxmemory-policy')]
    return judge(`${host} is a ${role ?? 'server'} with appendonly ${appendonly}, appendfsync ${fsync} and ` +
      `maxmemory-policy ${policy}`, { appendonly, fsync, policy })
  } finally {
    redis.disconnect()
  }
}

interface Durability { appendonly: string, fsync: string | undefined, policy: string | undefined }

/** The keys of the outbox never expire, so the policies `volatile-*` leave them. */
function judge (text: string, { appendonly, fsync, policy = '' }: Durability): Finding {
  if (appendonly !== 'yes') return failed(text, 'set appendonly yes: a restart of Redis loses queued identities')
  if (policy.startsWith('allkeys')) {
    return failed(text, 'set maxmemory-policy noeviction: a full Redis drops queued identities')
  }
  if (fsync !== 'always') return warning(text, 'set appendfsync always: a power failure loses queued identities')
  return policy === 'noeviction' ? ok(text) : warning(text, 'set maxmemory-policy noeviction')
}

/** Resolves with the answer to a command; undefined if Redis refuses it. Rejects after a second without an answer. */
async function ask<Result> (command: Promise<Result>): Promise<Result | undefined> {
  return command.catch((error: Error) => {
    if (error.name === 'ReplyError') return undefined
    throw error
  })
}
