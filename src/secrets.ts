import { constants } from 'node:fs'
import { open } from 'node:fs/promises'
import { isDeepStrictEqual } from 'node:util'
import type { Config, ConfigError } from './config.ts'
import type { Log } from './log.ts'
import { NO_METRICS, type Metrics } from './metrics.ts'

/** How often the files are read. Kubernetes swaps a link to their directory, which no watch on a file would notice. */
const INTERVAL_MS = 250

/** No secret is longer. */
const MAX_BYTES = 65_536

/** The files of secrets, as the configuration was read. */
export interface SecretFiles {
  /** The variables that are read from files, each with its path. */
  files: [name: string, path: string][]
  /** The texts of the files when the configuration was read, by path. */
  texts: ReadonlyMap<string, string>
  /** Returns the configuration with these texts of files, or throws a ConfigError. */
  reread: (readFile: (path: string) => string) => Config
}

interface Options extends SecretFiles {
  log: Log
  metrics?: Metrics | undefined
  /** Called with the whole configuration after the secret of one variable has changed. */
  onChange: (config: Config) => void
}

/** A file of a secret: when its value was read, and why what it holds now cannot be used, if so. */
export interface SecretState { variable: string, readAt: Date, problem: string | undefined }

/** A text, or why there is none. */
type Content = { text: string } | { cause: string }

/**
 * Reads the files of secrets again and again, and calls `onChange` for each new valid value. A value counts once two
 * reads have found it, because a file may be half written. When a file becomes unusable, that is logged once, and its
 * earlier value stays. `close` ends the watch.
 */
export function watchSecrets ({ files, texts, reread, log, onChange, metrics = NO_METRICS }: Options) {
  const used = new Map(texts)
  const seen = new Map<string, Content>()
  const problems = new Map<string, string>()
  const readAt = new Map(files.map(([name]) => [name, new Date()]))
  let isClosed = false

  function check (name: string, path: string, content: Content): void {
    const before = seen.get(name)
    seen.set(name, content)
    if ('text' in content && content.text === used.get(path)) {
      if (problems.delete(name)) log.info({ variable: `${name}_FILE` }, 'secret file usable again')
    } else if (isDeepStrictEqual(content, before)) {
      const problem = 'cause' in content ? content.cause : use(name, path, content.text)
      if (problem === undefined || problem === problems.get(name)) return
      problems.set(name, problem)
      metrics.secretReload(name, 'refused')
      log.error({ variable: `${name}_FILE`, cause: problem }, 'secret file unusable, old value kept')
    }
  }

  /** Puts the text of a file to use. Returns why it cannot be used, or undefined. */
  function use (name: string, path: string, text: string): string | undefined {
    let config: Config
    try {
      config = reread(other => other === path ? text : used.get(other) as string)
    } catch (error) {
      return (error as ConfigError).message
    }
    used.set(path, text)
    problems.delete(name)
    readAt.set(name, new Date())
    metrics.secretReload(name, 'used')
    log.info({ variable: name }, 'secret reloaded')
    onChange(config)
    return undefined
  }

  async function checkAll (): Promise<void> {
    // One at a time: a file system that hangs then holds one of Node's threads, and the others serve.
    for (const [name, path] of files) {
      const content = await readSecret(path)
      if (isClosed) return
      check(name, path, content)
    }
    setTimeout(checkAll, INTERVAL_MS).unref()
  }
  if (files.length > 0) checkAll()

  return {
    /** Returns the state of each file. */
    state: (): SecretState[] => Array.from(readAt, ([variable, at]) =>
      ({ variable, readAt: at, problem: problems.get(variable) })),
    close: () => { isClosed = true }
  }
}

/** Resolves with the text of a regular file. A pipe, such as bash's <(command), can be read only once, at start. */
export async function readSecret (path: string): Promise<Content> {
  try {
    // Without O_NONBLOCK the opening of a pipe would wait for its writer.
    const file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK)
    try {
      const stats = await file.stat()
      if (!stats.isFile()) return { cause: 'not a regular file' }
      if (stats.size > MAX_BYTES) return { cause: `more than ${MAX_BYTES} bytes` }
      const { buffer, bytesRead } = await file.read(Buffer.alloc(stats.size), 0, stats.size, 0)
      return { text: buffer.toString('utf8', 0, bytesRead) }
    } finally {
      await file.close()
    }
  } catch (error) {
    return { cause: String((error as NodeJS.ErrnoException).code) }
  }
}
