import { parseArgs } from 'node:util'
import type { Config } from '../config.ts'
import { baseUrl } from '../mixpanel/client.ts'
import { UsageError } from './admin.ts'
import { failed, reasonOf, TIMEOUT_MS, type Check, type Finding } from './checks/check.ts'
import { checkDisk } from './checks/disk.ts'
import { checkCredentials, checkMode } from './checks/mixpanel.ts'
import { networkChecks } from './checks/network.ts'
import { checkRedis } from './checks/redis.ts'
import { checkSecrets } from './checks/secrets.ts'

const LATER = 'try again later'

/**
 * Checks what the relay needs to work, and yields a line for each check: `ok`, `WARN` or `FAILED`, with what to do, or
 * `skipped` after the failure of another. Each takes at most 5 s. Sends no identity. With `--id-merge` it asks Mixpanel
 * for the mode of the project, by an event that cannot merge anything. `files` are the files of secrets. Throws a
 * UsageError at the end if a check failed.
 */
export async function * doctorCommand (
  config: Config, args: string[], files: [name: string, path: string][] = []
): AsyncGenerator<string> {
  const asksMode = readArgs(args)
  yield `The relay sends to ${new URL(baseUrl(config)).origin} (MIXPANEL_REGION=${config.MIXPANEL_REGION}` +
    `${config.MIXPANEL_URL === undefined ? '' : ', MIXPANEL_URL is set'}), ` +
    `for a project with MIXPANEL_ID_MERGE=${config.MIXPANEL_ID_MERGE}.\n`
  if (asksMode) {
    yield 'An event with two equal ids asks for the mode. In a project with Original ID Merge it is stored, and free.\n'
  }
  const checks = checksFor(config, files, asksMode)
  /** Each check that failed or was skipped, with the one that failed first. */
  const causes = new Map<string, string>()
  let failures = 0
  for (const check of checks) {
    const { name, needs } = check
    const cause = needs.map(other => causes.get(other)).find(other => other !== undefined)
    if (cause !== undefined) {
      causes.set(name, cause)
      yield `skipped ${name}: not checked, because ${cause} failed.\n`
      continue
    }
    const { status, text, hint } = await run(check)
    if (status === 'FAILED') {
      causes.set(name, name)
      failures++
    }
    yield `${status.padEnd(7)} ${name}: ${text}.${hint === undefined ? '' : ` ${upperFirst(hint)}.`}\n`
  }
  if (failures > 0) throw new UsageError(`${failures} of ${checks.length} checks failed.`)
}

/** Returns the checks that this configuration needs, in their order. */
function checksFor (config: Config, files: [name: string, path: string][], asksMode: boolean): Check[] {
  const network = networkChecks(config)
  // The last hop before HTTP.
  const { needs } = network.find(({ name }) => name === 'HTTP') as Check
  const rules: [isNeeded: boolean, check: Check][] = [
    [true, { name: 'credentials', needs, hint: LATER, run: () => checkCredentials(config) }],
    [asksMode, { name: 'mode', needs, hint: LATER, run: () => checkMode(config) }],
    [config.REDIS_URL !== undefined,
      { name: 'Redis', needs: [], hint: 'see whether it answers PING', run: () => checkRedis(config) }],
    [config.OUTBOX.startsWith('file:'),
      { name: 'disk', needs: [], hint: 'the disk hangs: see the log of the kernel', run: () => checkDisk(config) }],
    [files.length > 0,
      { name: 'secrets', needs: [], hint: 'see whether their disk hangs', run: () => checkSecrets(files) }]
  ]
  return [...network, ...rules.filter(([isNeeded]) => isNeeded).map(([, check]) => check)]
}

/** Resolves with what a check found, within TIMEOUT_MS. */
function run ({ hint, run }: Check): Promise<Finding> {
  const controller = new AbortController()
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise<never>((resolve, reject) => {
    timer = setTimeout(() => {
      reject(new Error(`no answer in ${TIMEOUT_MS} ms`))
      controller.abort()
    }, TIMEOUT_MS)
  })
  return Promise.race([run(controller.signal), timeout])
    .catch((error): Finding => failed(reasonOf(error), hint))
    .finally(() => clearTimeout(timer))
}

const upperFirst = (text: string) => text.charAt(0).toUpperCase() + text.slice(1)

function readArgs (args: string[]): boolean {
  try {
    return parseArgs({ args, options: { 'id-merge': { type: 'boolean', default: false } } }).values['id-merge']
  } catch {
    throw new UsageError('doctor takes only --id-merge.')
  }
}
