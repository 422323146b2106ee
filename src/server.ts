/**
 * The process. It handles signals before it loads anything: a process with id 1 ignores signals that have no handler,
 * and the rest of the program takes a quarter of a second to load.
 */
const END_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGQUIT'] as const
const exitDuringStart = () => process.exit(0)
for (const signal of END_SIGNALS) process.on(signal, exitDuringStart)
// The relay outlives its terminal.
process.on('SIGHUP', () => {})
// By default SIGUSR1 opens Node's inspector on loopback, which all containers of a pod share.
process.on('SIGUSR1', () => {})
// By default SIGUSR2 ends the process. It toggles the log level once there is a log.
let toggleDebug: (() => void) | undefined
process.on('SIGUSR2', () => toggleDebug?.())

const { fstatSync, readFileSync, writeSync } = process.getBuiltinModule('node:fs')
type Config = import('./config.ts').Config
type Env = import('./config.ts').Env
type SecretFiles = import('./secrets.ts').SecretFiles

const commands = new Map(Object.entries({
  serve: runServe,
  async 'check-config' (config: Config, _: string[], secrets: SecretFiles, env: Env) {
    const { describeConfig } = await import('./commands/check-config.ts')
    console.log(describeConfig(config, env))
  },
  async outbox (config: Config, args: string[]) {
    const { outboxCommand } = await import('./commands/outbox.ts')
    await print(outboxCommand(config, args))
  },
  async doctor (config: Config, args: string[], { files }: SecretFiles) {
    const { doctorCommand } = await import('./commands/doctor.ts')
    process.on('exit', () => {
      // A disk that does not answer would hold the exit.
      /* c8 ignore next -- a killed process reports no coverage */
      if (process.getActiveResourcesInfo().includes('FSReqPromise')) process.kill(process.pid, 'SIGKILL')
    })
    await print(doctorCommand(config, args, files))
  },
  async verify (config: Config, args: string[]) {
    const { verifyCommand } = await import('./commands/verify.ts')
    await print(verifyCommand(config, args, {
      stdin: process.stdin,
      report: console.error,
      exit: code => { process.exitCode = code }
    }))
  },
  /** Prints `openapi.yaml`. */
  async openapi (config: Config) {
    const { openapiDocument } = await import('./commands/serve.ts')
    console.log((await openapiDocument(config)).yaml)
  }
}))

/** Writes texts to standard output, no faster than they are read. */
async function print (texts: AsyncIterable<string>): Promise<void> {
  // In `outbox list | head` the reader closes the pipe early.
  process.stdout.on('error', () => process.exit(0))
  for await (const text of texts) {
    await new Promise(resolve => process.stdout.write(text, resolve))
  }
}

async function runServe (config: Config, _: string[], secrets: SecretFiles): Promise<void> {
  const [{ createDestination, createLog, fileSink, streamSink }, { openFilesLimit, serve }] =
    await Promise.all([import('./log.ts'), import('./commands/serve.ts')])
  const stats = fstatSync(1)
  const isStream = stats.isFIFO() || stats.isSocket() || process.stdout.isTTY
  let isWaitingForDisk = () => false
  const destination = createDestination(isStream ? streamSink(process.stdout) : fileSink(1))
  process.on('exit', () => {
    destination.flush()
    // On exit Node waits for its threads, and so for a name server or a disk that does not answer.
    const isResolving = process.getActiveResourcesInfo().includes('GetAddrInfoReqWrap')
    /* c8 ignore next -- a killed process reports no coverage; see test/slow/signals.test.ts */
    if (isResolving || isWaitingForDisk()) process.kill(process.pid, 'SIGKILL')
  })
  const log = createLog(config.LOG_LEVEL, destination)
  toggleDebug = log.toggleDebug
  const { serviceLinks, unknownVariables } = await import('./config.ts')
  for (const variable of unknownVariables(process.env)) log.logger.warn({ variable }, 'variable unknown')
  for (const variable of serviceLinks(process.env)) {
    const hint = 'Kubernetes sets it for a Service; enableServiceLinks: false ends that'
    log.logger.warn({ variable, hint }, 'variable ignored')
  }
  const relay = await serve(config, log, secrets, {
    version: version(),
    droppedLogLines: destination.dropped,
    openFiles: openFilesLimit(() => readFileSync('/proc/self/limits', 'utf8'))
  })
  isWaitingForDisk = relay.isWaitingForDisk
  for (const signal of END_SIGNALS) process.off(signal, exitDuringStart)
  if (process.env.npm_lifecycle_event !== 'start') return
  const { whenOrphaned } = await import('./commands/npm-parent.ts')
  whenOrphaned(() => process.ppid, pid => readFileSync(`/proc/${pid}/stat`, 'utf8'), relay.end)
}

/** Returns the version in package.json, which stands beside `dist`. */
const version = (): string => JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version

/**
 * Exits with 0 when the relay on HOST and PORT answers `/livez` within 2 s. An orchestrator runs it every few seconds,
 * so it uses neither `fetch` nor `node:http` nor the console, and is no module of its own: it costs 1.4 times the CPU
 * of a bare Node, and as a module 1.6 times (test/slow/healthcheck.test.ts).
 */
async function healthcheck (): Promise<void> {
  const { HOST: host = '', PORT: port } = process.env
  const reachable = { '': '127.0.0.1', '0.0.0.0': '127.0.0.1', '::': '::1' }[host] ?? host
  const socket = process.getBuiltinModule('node:net').connect({ host: reachable, port: Number(port || 8080) })
  const status = new Promise<string | undefined>((resolve, reject) => {
    socket.setTimeout(2000, () => reject(new Error('no answer in time')))
    socket.on('error', reject)
    socket.on('end', () => reject(new Error('no answer')))
    socket.on('data', bytes => resolve(/^HTTP\/1\.1 (\d{3}) /.exec(String(bytes))?.[1]))
  })
  socket.write('GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n')
  const problem = await status.then(found => found === '200'
    ? undefined
    : `/livez answered ${found ?? 'something that is not HTTP'}`, (error: Error) => error.message)
  const [fd, state, code] = problem === undefined ? [1, 'alive', 0] as const : [2, `not alive: ${problem}`, 1] as const
  writeSync(fd, `The relay is ${state}.\n`)
  process.exit(code)
}

/** The commands that need no configuration. */
const bareCommands = new Map(Object.entries({
  healthcheck,
  async '--help' () {
    const { USAGE } = await import('./commands/usage.ts')
    console.log(USAGE)
  },
  async '--version' () {
    console.log(version())
  }
}))

/** Runs one command. The exit code is 0, or 1 with one sentence for each error on standard error. */
async function main (name = 'serve', args: string[]): Promise<void> {
  const runBare = bareCommands.get(name)
  if (runBare !== undefined) return runBare()
  const { ConfigError, readConfig, secretFiles, sensitiveNames } = await import('./config.ts')
  const run = commands.get(name)
  if (run === undefined) {
    const names = [...commands.keys(), ...bareCommands.keys()].join(', ')
    throw new ConfigError(`${name} is not a command: use ${names}.`)
  }
  const env = { ...process.env }
  const texts = new Map<string, string>()
  const config = readConfig(env, path => {
    texts.set(path, readFileSync(path, 'utf8'))
    return String(texts.get(path))
  })
  // Keeps secrets out of child processes and diagnostic reports.
  for (const name of sensitiveNames(env)) delete process.env[name]
  const reread = readConfig.bind(undefined, env)
  await run(config, args, { files: secretFiles(env), texts, reread }, env)
}

main(process.argv[2], process.argv.slice(3)).catch((error: Error) => {
  const isUserError = ['ConfigError', 'UsageError'].includes(error.name)
  console.error(isUserError ? error.message : `The relay cannot continue: ${error.message}.`)
  process.exit(1)
})

export {}
